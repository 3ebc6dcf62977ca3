"""An entry of a mask database's list, and its reading."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from .json_list import shorten
from .mask_files import safe_name
from .regions import REGIONS, regions_from_labels
from .vocabulary import LABELS

MAX_DIM = 4096


@dataclass(frozen=True)
class MaskEntry:
    """One label map of a database, as the list describes it.

    Args:
        pseudo_label_filename: path of its file below the folder, or in the .zip.
        dim: voxels along X, Y, Z.
        spacing: voxel size in mm along X, Y, Z.
        label_list: its labels other than background, ascending.
        top_region_index, bottom_region_index: one-hot region of its first and its last slice from the top.
    """

    pseudo_label_filename: str
    dim: tuple[int, int, int]
    spacing: tuple[float, float, float]
    label_list: tuple[int, ...]
    top_region_index: tuple[int, int, int, int] | None = None
    bottom_region_index: tuple[int, int, int, int] | None = None

    @property
    def regions(self) -> tuple[int, int] | None:
        """Region (0..3) of the first and of the last slice; `None` where neither the list nor a label tells."""
        if self.top_region_index is not None:
            return self.top_region_index.index(1), self.bottom_region_index.index(1)
        try:
            return regions_from_labels(self.label_list)
        except ValueError:
            return None


def read_entry(item: object) -> MaskEntry:
    """An entry of the JSON list; raises a `ValueError` that names everything that is wrong with it."""
    if not isinstance(item, dict):
        raise ValueError(f"{shorten(item)} must have names and values, like pseudo_label_filename")
    values, problems = {}, []
    for name, parse in FIELDS.items():
        value = item.get(name)
        if value is None and name in OPTIONAL:
            continue
        try:
            values[name] = parse(value)
        except ValueError as error:
            problems.append(f"{name} is {shorten(value)}, must be {error}")
    top, bottom = (values.get(name) for name in OPTIONAL)
    if not problems and (top is None) != (bottom is None):
        problems.append(f"{' and '.join(OPTIONAL)} must both be there, or neither")
    if not problems and top is not None and top.index(1) > bottom.index(1):
        problems.append(f"top_region_index {list(top)} is below bottom_region_index {list(bottom)}")
    if problems:
        raise ValueError(", ".join(problems))
    return MaskEntry(**values)


def _file_name(value: object) -> str:
    if not isinstance(value, str) or not value.endswith((".nii", ".nii.gz")):
        raise ValueError("the name of a .nii or .nii.gz file")
    try:
        return safe_name(value)
    except ValueError:
        raise ValueError("a relative path without '..'") from None


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(number, Real) and math.isfinite(number) for number in value)


def _dim(value: object) -> tuple[int, int, int]:
    if not _numbers(value) or len(value) != 3 or any(n != int(n) or not 1 <= n <= MAX_DIM for n in value):
        raise ValueError(f"three whole numbers of voxels, 1 to {MAX_DIM}")
    return tuple(int(n) for n in value)


def _spacing(value: object) -> tuple[float, float, float]:
    if not _numbers(value) or len(value) != 3 or not all(value):
        raise ValueError("three numbers of mm, not 0")
    return tuple(abs(float(mm)) for mm in value)  # a sign is the direction of the axis


def _label_list(value: object) -> tuple[int, ...]:
    known = {0, *LABELS.values()}
    if not _numbers(value) or not set(value) <= known:
        raise ValueError("a list of labels, 1 to 132 and 200")
    return tuple(sorted({int(label) for label in value} - {0}))


def _region_index(value: object) -> tuple[int, int, int, int]:
    if not _numbers(value) or sorted(value) != [0, 0, 0, 1]:
        raise ValueError(f"three zeros and a 1, for one of {', '.join(REGIONS)}")
    return tuple(int(indicator) for indicator in value)


FIELDS: dict[str, Callable[[object], object]] = {
    "pseudo_label_filename": _file_name,
    "dim": _dim,
    "spacing": _spacing,
    "label_list": _label_list,
    "top_region_index": _region_index,
    "bottom_region_index": _region_index,
}
OPTIONAL = ("top_region_index", "bottom_region_index")
