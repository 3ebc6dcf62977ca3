"""Files in a folder or in a .zip that came from elsewhere, read without trusting either."""

import gzip
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

MAX_UNPACKED = 2**38
"""Bytes that the members of a .zip may declare together; the released one is some thousand label maps."""

CHUNK = 2**24

# What zipfile and gzip let through when the bytes are damaged, of an unknown kind, or encrypted.
UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError, RuntimeError)


def safe_name(name: str) -> str:
    """A file's path below a folder, as "a/b" also for "./a/b".

    Raises:
        ValueError: for a path that leads elsewhere, or that not all systems read alike.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} must be a relative path without '..' and backslashes")
    if PureWindowsPath(name).drive:
        raise ValueError(f"{name!r} must be a relative path without a drive")
    return str(path)


def read_file(source: str | os.PathLike, name: str, limit: int) -> bytes:
    """Content of a file in a folder or a .zip, decompressed if it is gzipped; nothing is unpacked to the disk.

    Args:
        source: the folder, or the .zip, which may hold its files in one more folder.
        name: path of the file in it.
        limit: bytes that it may have when decompressed.

    Raises:
        FileNotFoundError: if there is no such folder, .zip or file.
        ValueError: if it is damaged, cut short, too large or encrypted; if the .zip is, or has a member that is
            absolute, has a ".." or is a symbolic link.
    """
    with _open(Path(source), safe_name(name)) as stream:
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream = gzip.GzipFile(fileobj=stream)
        chunks, size = [], 0
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise ValueError(
                    f"{name!r} in {str(source)!r} unpacks to more than the {limit} bytes it can have; download it "
                    "again."
                )
            chunks.append(chunk)
    return b"".join(chunks)


@contextmanager
def _open(source: Path, name: str) -> Iterator[BinaryIO]:
    missing = f"{str(source)!r} has no file {name!r}; download it again, or take its entry out of the list."
    try:
        if source.is_dir():
            if not (source / name).is_file():
                raise FileNotFoundError(missing)
            with open(source / name, "rb") as stream:
                yield stream
            return
        if not source.is_file():
            raise FileNotFoundError(f"No folder and no .zip {str(source)!r}; download it, or give its path.")
        with zipfile.ZipFile(source) as archive:
            members = _checked_members(archive, source)
            folders = sorted({path.split("/")[0] for path in members if "/" in path})
            found = [path for path in (name, *(f"{folder}/{name}" for folder in folders)) if path in members]
            if not found:
                raise FileNotFoundError(missing)
            with archive.open(members[found[0]]) as stream:
                yield stream
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"{name!r} in {str(source)!r} cannot be read ({line}); if it is damaged or cut short, download it again."
        ) from error


def _checked_members(archive: zipfile.ZipFile, source: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of a .zip by their path."""
    members, unpacked = {}, 0
    for member in archive.infolist():
        if member.is_dir() and not PurePosixPath(member.filename).parts:
            continue  # "./", the folder itself, as bsdtar writes it
        try:
            path = safe_name(member.filename)
        except ValueError as error:
            raise ValueError(f"{str(source)!r} is refused: its member {error}; download it again.") from None
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{str(source)!r} is refused: its member {path!r} is a symbolic link; download it again.")
        members[path] = member
        unpacked += member.file_size
    if unpacked > MAX_UNPACKED:
        raise ValueError(
            f"{str(source)!r} is refused: it unpacks to {unpacked / 2**30:.0f} GiB, more than the "
            f"{MAX_UNPACKED / 2**30:.0f} GiB that label maps can have; download it again."
        )
    return members
