"""Sizes and spacings that suit a region, of the published CT models."""

from collections.abc import Iterable

import numpy as np

from ..anatomy import region_of_word

Grid = tuple[tuple[int, int, int], tuple[float, float, float]]

RECOMMENDED_CT_GRIDS: dict[tuple[str, ...], Grid] = {
    ("head", "chest"): ((512, 512, 128), (0.645, 0.645, 2.219)),
    ("head", "chest", "abdomen"): ((512, 512, 384), (0.977, 0.977, 2.103)),
    ("head", "chest", "abdomen", "lower"): ((512, 512, 384), (1.367, 1.367, 4.603)),
    ("chest",): ((512, 512, 128), (0.684, 0.684, 2.422)),
    ("chest", "abdomen"): ((512, 512, 128), (0.781, 0.781, 2.981)),
    ("chest", "abdomen", "lower"): ((512, 512, 256), (0.793, 0.793, 1.826)),
    ("abdomen",): ((512, 512, 128), (0.723, 0.723, 1.182)),
    ("abdomen", "lower"): ((512, 512, 384), (0.808, 0.808, 0.729)),
    ("lower",): ((512, 512, 384), (0.839, 0.839, 0.728)),
}
"""Words of `body_region` -> size in voxels and spacing in mm: medians of the training data (published with MAISI)."""

XY_FOV = (0.75, 1.5)
Z_FOV = (0.5, 2.0)
"""Shares of a recommended field of view that are less and more than the training data had."""


def recommended_grid(regions: Iterable[int]) -> Grid | None:
    """Size and spacing that suit regions (0..3), if there is a recommendation for just these."""
    regions = set(regions)
    for words, grid in RECOMMENDED_CT_GRIDS.items():
        if {region_of_word(word) for word in words} == regions:
            return grid
    return None


def describe_unusual_fov(
    regions: Iterable[int], size: tuple[int, int, int], spacing: tuple[float, float, float]
) -> str | None:
    """What to say of a field of view that is far from that of the training data for regions; `None` if it is not, or
    these are not known."""
    regions = set(regions)
    grid = recommended_grid(regions)
    if grid is None:
        return None
    fov, usual = (np.multiply(*one) for one in ((size, spacing), grid))
    limits = (XY_FOV, XY_FOV, Z_FOV)
    if all(low <= mm / other <= high for (low, high), mm, other in zip(limits, fov, usual)):
        return None
    words = " and ".join(word for word in ("head", "chest", "abdomen", "pelvis") if region_of_word(word) in regions)
    return (
        f"the field of view of {_mm(fov)} of size {tuple(size)} is far from the {_mm(usual)} that the model has seen "
        f"of {words}: expect a worse image, or choose a size and spacing nearer to {grid[0]} at {grid[1]} mm"
    )


def _mm(fov: np.ndarray) -> str:
    return " x ".join(f"{mm:.0f}" for mm in fov) + " mm"
