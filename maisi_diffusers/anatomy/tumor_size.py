"""A tumor of the volume that was asked for.

Networks draw tumors where they may be, and of a volume that follows the one asked for loosely, if at all: a tumor is a
few of many thousand voxels, which training hardly notices. So its place is left to the network, and its volume is
brought to the one asked for. The published system does not do this.
"""

import math
from collections.abc import Mapping

import cc3d
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import KDTree

from .tumors import remove_tumors
from .vocabulary import TUMORS

LARGEST_SHARE = 0.8  # of an organ: the rest of it stays
STRAY = 0.1  # of the volume asked for
DEEP = 0.9  # of the greatest depth there is: an organ too thin for a tumor has it about its middle


def fit_tumor(
    labels: np.ndarray,
    tumor: int,
    ml: float,
    spacing: tuple[float, float, float],
    generator: torch.Generator | None = None,
    tumors: Mapping[int, tuple[int, ...]] = TUMORS,
) -> np.ndarray:
    """
    Bring a tumor to a volume: it grows evenly into its organ, or shrinks evenly, and its organ is where it was. Pieces
    of less than a tenth of the volume are strays, and go. If there are no others, it grows about a voxel of its organ
    that is as deep in it as the tumor is to be.

    Args:
        labels: uint8 (X, Y, Z) in MAISI's vocabulary; stays as it is.
        tumor: its label.
        ml: its volume afterwards, but for at most 0.8 of the organ and itself.
        spacing: mm along X, Y, Z.
        generator: draws that voxel.
        tumors: tumor -> the labels it can sit in; a fine-tuned model may have more.

    Returns:
        the label map; as it was where the tumor has no organ.
    """
    is_tumor = labels == tumor
    fitted = np.where(is_tumor, remove_tumors(labels, spacing, {tumor: tumors[tumor]}), labels)  # cysts stay
    room = np.isin(fitted, tumors[tumor])
    if not room.any():
        return labels.copy()
    voxels = np.clip(round(ml * 1000 / np.prod(spacing)), 1, max(int(LARGEST_SHARE * room.sum()), 1))
    is_tumor = cc3d.dust(is_tumor, threshold=math.ceil(STRAY * voxels), connectivity=26).astype(bool)
    if not is_tumor.any():
        is_tumor[draw_place(room, ml, spacing, generator)] = True
    # Voxels in the order in which they belong to it: those inside by their depth, then the others by their distance.
    inside, outside = np.argwhere(is_tumor), np.argwhere(room & ~is_tumor)
    surface = np.argwhere(is_tumor & ~ndimage.binary_erosion(is_tumor))
    distances, _ = KDTree(surface * spacing).query(outside * spacing)
    depths = depth(is_tumor, spacing)[is_tumor]
    order = np.concatenate([-depths, distances]).argsort(kind="stable")[:voxels]
    fitted[tuple(np.concatenate([inside, outside])[order].T)] = tumor
    return fitted


def draw_place(
    room: np.ndarray, ml: float, spacing: tuple[float, float, float], generator: torch.Generator | None
) -> tuple[int, int, int]:
    """A voxel around which there is room for a ball, or almost as much as anywhere."""
    radius = (ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    depths = depth(room, spacing)
    places = np.argwhere(depths >= min(radius, DEEP * depths.max()))
    device = "cpu" if generator is None else generator.device
    return tuple(places[torch.randint(len(places), (), generator=generator, device=device).item()])


def depth(mask: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Of every voxel of a mask (X, Y, Z), how far in mm it is to one outside; of the others 0."""
    depths = np.zeros(mask.shape, dtype=np.float32)
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    inside = ndimage.distance_transform_edt(np.pad(mask[box], 1), sampling=spacing)
    depths[box] = inside[1:-1, 1:-1, 1:-1]
    return depths
