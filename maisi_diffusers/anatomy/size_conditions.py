"""Sizes of anatomy that go together: what is not given is taken from a real case that is like what is given."""

import math
import os
from collections.abc import Iterable
from numbers import Real

from .json_list import read_json_list, shorten
from .vocabulary import CONTROLLABLE_ANATOMY, TUMORS, label_name

ABSENT = -1.0

_TUMORS = tuple(i for i, name in enumerate(CONTROLLABLE_ANATOMY) if name in map(label_name, TUMORS))


def read_size_conditions(path: str | os.PathLike) -> list[list[float]]:
    """Read the anatomy sizes of real cases, in the published layout: a JSON list of `{"organ_size": [10 sizes]}`.

    Args:
        path: the JSON file.

    Returns:
        for every case the sizes of [`CONTROLLABLE_ANATOMY`], 0..1 or -1 for absent.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such list; everything that is wrong in it is named.
    """
    return read_json_list(path, lambda case: check_sizes(case.get("organ_size") if isinstance(case, dict) else case))


def check_sizes(sizes: object) -> list[float]:
    """The sizes of one case; raises a `ValueError` that says what is wrong with them."""
    if (
        not isinstance(sizes, (list, tuple))
        or len(sizes) != len(CONTROLLABLE_ANATOMY)
        or not all(isinstance(size, Real) and math.isfinite(size) for size in sizes)
        or not all(size == ABSENT or 0 <= size <= 1 for size in sizes)
    ):
        raise ValueError(
            f"organ_size is {shorten(sizes)}, must be {len(CONTROLLABLE_ANATOMY)} numbers of 0 to 1, or -1 for absent"
        )
    return [float(size) for size in sizes]


def complete_anatomy_size(given: Iterable[tuple[str, float]], conditions: Iterable[Iterable[float]]) -> list[float]:
    """The sizes of all controllable anatomy, from those of some (published rule).

    Args:
        given: pairs of name and size, 0..1 or -1 for absent.
        conditions: sizes of real cases, as [`read_size_conditions`] gives them.

    Returns:
        the given sizes, and for the other organs those of the nearest case: the sum of the differences in what is
        given is the least, where absence counts as -1. A tumor that is not given is absent, whatever the nearest case
        has: it was not asked for.

    Example:

    ```py
    >>> from maisi_diffusers.anatomy import complete_anatomy_size, read_size_conditions

    >>> conditions = read_size_conditions("anatomy_size_conditions.json")
    >>> sizes = complete_anatomy_size([("liver", 0.5), ("hepatic tumor", 0.3)], conditions)
    ```
    """
    wanted = {CONTROLLABLE_ANATOMY.index(name): float(size) for name, size in given}
    nearest = min(conditions, key=lambda case: sum(abs(case[i] - size) for i, size in wanted.items()))
    completed = [ABSENT if i in _TUMORS else size for i, size in enumerate(nearest)]
    for i, size in wanted.items():
        completed[i] = size
    return completed
