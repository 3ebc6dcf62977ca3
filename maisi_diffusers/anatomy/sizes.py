"""How large the controllable organs and tumors of a label map are, as a mask model is told."""

from collections.abc import Mapping, Sequence

import numpy as np

from .size_conditions import ABSENT
from .vocabulary import CONTROLLABLE_ANATOMY, LABELS


def anatomy_sizes(labels: np.ndarray, spacing: Sequence[float], ranges: Mapping[str, Sequence[float]]) -> list[float]:
    """
    Sizes of the organs and tumors of [`CONTROLLABLE_ANATOMY`] in a label map.

    Args:
        labels: (X, Y, Z) in MAISI's vocabulary.
        spacing: mm along X, Y, Z.
        ranges: name -> volumes in ml that are size 0 and size 1, see [`size_of_volume`].

    Returns:
        10 numbers, 0 to 1, or -1 for what is not there.
    """
    voxels = np.bincount(labels.ravel(), minlength=256)
    ml = voxels * float(np.prod(spacing)) / 1000
    return [
        round(size_of_volume(ml[LABELS[name]], ranges[name]), 4) if voxels[LABELS[name]] else ABSENT
        for name in CONTROLLABLE_ANATOMY
    ]


def size_of_volume(ml: float, limits: Sequence[float]) -> float:
    """
    The size, 0 to 1, of a volume.

    Args:
        ml: the volume.
        limits: the volumes in ml that are size 0 and size 1. Between them the size grows with the cube root of the
            volume; volumes beyond are 0 and 1.
    """
    low, high = np.cbrt(limits)
    return float(np.clip((np.cbrt(ml) - low) / (high - low), 0, 1))


def volume_of_size(size: float, limits: Sequence[float]) -> float:
    """
    The volume in ml of a size, see [`size_of_volume`].

    Args:
        size: 0 to 1.
        limits: the volumes in ml that are size 0 and size 1.
    """
    low, high = np.cbrt(limits)
    return float((low + size * (high - low)) ** 3)
