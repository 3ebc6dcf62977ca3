"""Grids in words."""

from collections.abc import Sequence


def grid_text(size: Sequence[int], spacing: Sequence[float]) -> str:
    """Size and spacing of a volume, "128 x 128 x 64 voxels of 3 x 3 x 4.5 mm"."""
    return f"{size_text(size)} voxels of {' x '.join(f'{mm:g}' for mm in spacing)} mm"


def size_text(size: Sequence[int]) -> str:
    """A size in voxels, "128 x 128 x 64"."""
    return " x ".join(map(str, size))
