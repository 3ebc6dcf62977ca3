"""Sizes and spacings that suit a region: of the published CT models grids, of the MR models fields of view."""

from collections.abc import Iterable

import numpy as np

from ..anatomy import REGION_WORDS, region_of_word
from ..imaging import modality_code, modality_names

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

MR_FOVS: dict[str, dict[str, dict[str, list[list[float]]]]] = {
    "rflow-mr": {
        "mri_t1": {"head": [[160, 256, 256]], "chest": [[174, 200, 200]], "abdomen": [[380, 309, 288]]},
        "mri_t2": {"head": [[240, 240, 162.5]], "pelvis": [[170, 170, 90]], "abdomen": [[350, 350, 246]]},
        "mri_flair": {"head": [[200, 250, 250]]},
    },
    "rflow-mr-brain": {
        "mri_t1": {"head": [[240, 240, 174], [176, 250, 250], [240, 200, 240]]},
        "mri_t2": {"head": [[240, 240, 158], [162, 240, 240], [200, 180, 200]]},
        "mri_flair": {"head": [[250, 250, 175], [176, 250, 250], [250, 200, 250]]},
        "mri_swi": {"head": [[230, 230, 145], [140, 230, 230], [230, 155, 230]]},
        "mri_mra": {"head": [[220, 220, 158], [158, 250, 250], [240, 179, 240]]},
    },
}
"""Version -> modality -> word of `body_region` -> fields of view in mm along X, Y, Z that the published MR models are
meant for, of the brain model axial, sagittal, coronal; of the other "chest" is the breast, "pelvis" the prostate."""

MR_VOXEL = 1.0  # mm: a field of view becomes the allowed grid with voxels nearest to it

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
    """What to say of a field of view that is far from that of the training data for regions and all between them;
    `None` if it is not, or these are not known."""
    regions = set(regions)
    regions = set(range(min(regions), max(regions) + 1))
    grid = recommended_grid(regions)
    if grid is None:
        return None
    fov, usual = (np.multiply(*one) for one in ((size, spacing), grid))
    limits = (XY_FOV, XY_FOV, Z_FOV)
    if all(low <= mm / other <= high for (low, high), mm, other in zip(limits, fov, usual)):
        return None
    words = " and ".join(word for i, word in enumerate(REGION_WORDS) if i in regions)
    return (
        f"the field of view of {_mm(fov)} of size {tuple(size)} is far from the {_mm(usual)} that the model has seen "
        f"of {words}: expect a worse image, or choose a size and spacing nearer to {grid[0]} at {grid[1]} mm"
    )


def recommended_mr_fovs(fovs: dict, modality: int, regions: Iterable[int] | None) -> list[list[float]]:
    """
    Fields of view in mm that suit a modality and regions.

    Args:
        fovs: the model's own, see `MR_FOVS`, in any order.
        modality: its code. One without a contrast (MR, unknown) goes with any.
        regions: 0..3; `None` goes with any.

    Returns:
        By modality's code, then region from the head down.
    """
    names = modality_names(modality)
    wanted = None if regions is None else set(regions)
    suitable = [
        (modality_code(name), region_of_word(word), some)
        for name, by_word in fovs.items()
        for word, some in by_word.items()
        if (name in names or not names) and (wanted is None or wanted == {region_of_word(word)})
    ]
    # A saved config has its keys in alphabetical order: the order is not left to it, since the first one is used.
    return [fov for _, _, some in sorted(suitable, key=lambda one: one[:2]) for fov in some]


def describe_unusual_mr_fov(
    usual: list[list[float]], size: tuple[int, int, int], spacing: tuple[float, float, float]
) -> str | None:
    """What to say of a field of view that is far from all that a model is meant for; `None` if it is not."""
    fov = np.multiply(size, spacing)
    low, high = XY_FOV
    if not usual or any(all(low <= mm / other <= high for mm, other in zip(fov, one)) for one in usual):
        return None
    return (
        f"the field of view of {_mm(fov)} of size {tuple(size)} is far from all that the model is meant for, "
        f"{', '.join(map(_mm, usual))}: expect a worse image, or choose a size and spacing nearer to one of them"
    )


def _mm(fov: np.ndarray) -> str:
    return " x ".join(f"{mm:.0f}" for mm in fov) + " mm"
