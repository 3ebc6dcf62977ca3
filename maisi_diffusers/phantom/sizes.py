"""How large the controllable organs and tumors of a label map are, as the mask model is told."""

import numpy as np

from ..anatomy import CONTROLLABLE_ANATOMY, LABELS

# Volumes in ml that are size 0 and size 1: for organs about what one phantom in twenty is below and above, for tumors
# spheres of 10 and 60 mm. Between them the size grows with the cube root of the volume.
SIZE_RANGES = {
    "gallbladder": (5.0, 60.0),
    "liver": (1000.0, 2300.0),
    "stomach": (190.0, 650.0),
    "pancreas": (26.0, 96.0),
    "colon": (320.0, 830.0),
    **dict.fromkeys(CONTROLLABLE_ANATOMY[5:], (np.pi / 6, np.pi / 6 * 216)),
}
ABSENT = -1.0


def anatomy_sizes(labels: np.ndarray, spacing: tuple[float, float, float]) -> list[float]:
    """
    Sizes of the organs and tumors of [`CONTROLLABLE_ANATOMY`] in a label map.

    Args:
        labels: (X, Y, Z) in MAISI's vocabulary.
        spacing: mm along X, Y, Z.

    Returns:
        10 numbers, 0 to 1, or -1 for what is not there.
    """
    voxels = np.bincount(labels.ravel(), minlength=256)
    ml = voxels * float(np.prod(spacing)) / 1000
    sizes = []
    for name in CONTROLLABLE_ANATOMY:
        low, high = np.cbrt(SIZE_RANGES[name])
        size = float(np.clip((np.cbrt(ml[LABELS[name]]) - low) / (high - low), 0, 1))
        sizes.append(round(size, 4) if voxels[LABELS[name]] else ABSENT)
    return sizes
