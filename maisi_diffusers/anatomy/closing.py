"""Gaps of a mask, closed."""

import numpy as np
from scipy import ndimage


def close(mask: np.ndarray, width: int) -> np.ndarray:
    """A mask (X, Y, Z) with its gaps closed that a cube of so many voxels, an odd number, does not fit in."""
    pad = width // 2
    closed = ndimage.binary_closing(np.pad(mask, pad), np.ones((width,) * 3))
    return closed[(slice(pad, -pad),) * 3]
