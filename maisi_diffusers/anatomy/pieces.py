"""The pieces of a mask, whose voxels share a side, an edge or a corner."""

import cc3d
import numpy as np


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """Of a mask (X, Y, Z)."""
    return cc3d.largest_k(thicker(mask), k=1, connectivity=26)[tuple(map(slice, mask.shape))] > 0


def large_pieces(mask: np.ndarray, voxels: int) -> np.ndarray:
    """Those of a mask (X, Y, Z) of so many voxels or more."""
    return cc3d.dust(thicker(mask), threshold=voxels, connectivity=26)[tuple(map(slice, mask.shape))]


def thicker(mask: np.ndarray) -> np.ndarray:
    """A mask with two voxels along each axis at least: cc3d 4.1.1 fails at some that have one."""
    return np.pad(mask, [(0, int(n == 1)) for n in mask.shape])
