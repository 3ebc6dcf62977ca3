"""Files and folders that are there as a whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file or a folder, that takes its name when the block ends well.

    What was at `path` is replaced; when the block fails, it stays as it was and the temporary one is removed. The name
    of the temporary one begins with a dot and ends like `path`.

    Example:

    ```py
    >>> with write_atomically("list.json") as temporary:
    ...     temporary.write_text("{}")
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    remove(temporary)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise


@contextmanager
def write_files_atomically(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder whose files move to `folder`, each as a whole, when the block ends well.

    What else is in `folder` stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            publish(file, folder / file.name)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file or folder its name, after its content has reached the disk, and the permissions of a new
    one: some libraries write files that their owner alone can read."""
    for file in [*temporary.rglob("*"), temporary]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~UMASK)
        flush(file)
    if temporary.is_dir() and path.is_symlink():
        path.unlink()
    if not path.is_dir():
        os.replace(temporary, path)
        flush(path.parent)
        return
    # A folder cannot take the place of another one, which therefore steps aside until the new one is there.
    previous = _set_aside(path)
    try:
        os.replace(temporary, path)
    except BaseException:
        if not path.exists():
            os.replace(previous, path)
        raise
    flush(path.parent)
    shutil.rmtree(previous)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one. A folder loses its name first: no half of it is found."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(_set_aside(path))
    else:
        path.unlink(missing_ok=True)


def _set_aside(folder: Path) -> Path:
    """Rename a folder that is to be removed."""
    aside = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    shutil.rmtree(aside, ignore_errors=True)  # of a removal that was interrupted
    os.replace(folder, aside)
    return aside


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
