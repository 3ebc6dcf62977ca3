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

from .pieces import large_pieces
from .tumors import remove_tumors
from .vocabulary import TUMORS

LARGEST_SHARE = 0.8  # of an organ: the rest of it stays
DEEP = 0.9  # of the greatest depth there is: an organ too thin for a tumor has it about its middle


def fit_tumor(
    labels: np.ndarray,
    tumor: int,
    ml: float,
    spacing: tuple[float, float, float],
    generator: torch.Generator | None = None,
    tumors: Mapping[int, tuple[int, ...]] = TUMORS,
    stray: float = 0.0,
) -> np.ndarray:
    """
    Bring a tumor to a volume: it grows evenly into the organ around it, or shrinks evenly, and its organ is where it
    was. If there is none, it grows about a voxel of its organ that is as deep in it as the tumor is to be.

    An organ that is thin can come apart where a tumor grows in it, and so can a tumor where it is thin and shrinks.

    Args:
        labels: uint8 (X, Y, Z) in MAISI's vocabulary; stays as it is.
        tumor: its label.
        ml: its volume afterwards, but for at most 0.8 of the organ and itself.
        spacing: mm along X, Y, Z.
        generator: draws that voxel.
        tumors: tumor -> the labels it can sit in; a fine-tuned model may have more.
        stray: pieces of less than this share of `ml` become organ before; a network's strays are not to grow.

    Returns:
        the label map; as it was if the tumor has no organ there.

    Raises:
        ValueError: for a label that is no tumor, and a volume that is not above 0.
    """
    if tumor not in tumors:
        raise ValueError(f"tumor={tumor} is no tumor: give one of {', '.join(map(str, tumors))}")
    if not 0 < ml < np.inf:
        raise ValueError(f"ml={ml} is no volume: give a number above 0")
    if not np.isin(labels, tumors[tumor]).any():
        return labels.copy()
    is_tumor = labels == tumor
    fitted = np.where(is_tumor, remove_tumors(labels, spacing, {tumor: tumors[tumor]}), labels)  # cysts stay
    room = np.isin(fitted, tumors[tumor])
    wanted = ml * 1000 / math.prod(spacing)
    is_tumor = large_pieces(is_tumor, math.ceil(stray * wanted))
    if not is_tumor.any():
        is_tumor[draw_place(room, ml, spacing, generator)] = True
    pieces = cc3d.connected_components(room, connectivity=26)
    room = np.isin(pieces, np.setdiff1d(pieces[is_tumor], 0))  # those it touches, so that it does not leap over gaps
    voxels = min(max(round(wanted), 1), max(int(LARGEST_SHARE * room.sum()), 1))
    inside = np.argwhere(is_tumor)
    if voxels <= len(inside):
        deepest_first = depth(is_tumor, spacing)[is_tumor].argsort(kind="stable")[::-1]
        added = inside[deepest_first[:voxels]]
    else:
        added = np.concatenate([inside, nearest(is_tumor, room & ~is_tumor, voxels - len(inside), spacing)])
    fitted[tuple(added.T)] = tumor
    return fitted


def nearest(is_tumor: np.ndarray, room: np.ndarray, number: int, spacing: tuple[float, float, float]) -> np.ndarray:
    """So many places (number, 3) in a room that are nearest to a tumor."""
    surface = KDTree(np.argwhere(is_tumor & ~ndimage.binary_erosion(is_tumor)) * spacing)
    (own,) = ndimage.find_objects(is_tumor.astype(np.uint8))
    reach = (number * math.prod(spacing)) ** (1 / 3)  # mm; an organ is many times as large
    while True:
        start = [max(s.start - math.ceil(reach / mm), 0) for s, mm in zip(own, spacing)]
        box = tuple(slice(low, s.stop + math.ceil(reach / mm)) for low, s, mm in zip(start, own, spacing))
        places = np.argwhere(room[box]) + start
        distances, _ = surface.query(places * spacing, distance_upper_bound=reach)
        if np.isfinite(distances).sum() >= number:
            return places[distances.argsort(kind="stable")[:number]]
        reach *= 2


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
