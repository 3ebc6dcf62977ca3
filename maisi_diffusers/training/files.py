"""Files that are there as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file or a folder, that takes its name when the block ends well.

    The content reaches the disk before the name does. What was at `path` is replaced; when the block fails, it stays
    as it was and the temporary one is removed. The name of the temporary one begins with a dot and ends like `path`.

    Example:

    ```py
    >>> with write_atomically("list.json") as temporary:
    ...     temporary.write_text("{}")
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    _remove(temporary)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _flush(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    _flush(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
