"""JSON files that are a list of like entries, with all that is wrong in them said at once."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Entry = TypeVar("Entry")

PROBLEMS_SHOWN = 20


def read_json_list(path: str | os.PathLike, parse: Callable[[object], Entry]) -> list[Entry]:
    """Read a JSON list.

    Args:
        path: the file.
        parse: makes of one entry what is wanted, or raises a `ValueError` that says what is wrong with it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON list, or an empty one; every broken entry is named, the first twenty in full.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}; download it, or give its path.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's are ValueErrors
        raise ValueError(f"{str(path)!r} is no JSON file ({error}); download it again.") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{str(path)!r} must be a JSON list with at least one entry; download it again.")

    entries, problems = [], []
    for i, item in enumerate(content):
        try:
            entries.append(parse(item))
        except ValueError as error:
            problems.append(f"entry {i}: {error}")
    if problems:
        more = [f"{len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        raise ValueError(
            f"{len(problems)} of {len(content)} entries of {str(path)!r} are wrong; correct them: "
            + "; ".join([*problems[:PROBLEMS_SHOWN], *more])
        )
    return entries


def shorten(value: object) -> str:
    """A value of a file as a message can show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
