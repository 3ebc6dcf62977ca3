"""Variants of a label map: zoomed a little, or with its tumor moved and deformed inside of its organ.

Rules and ranges are the published ones, in mm instead of voxels of about 1 mm, but for the closing of organs; and a
tumor turns about its own centre and not about the volume's, never grows over another organ, and the search for a place
for it ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from .closing import close
from .tumors import remove_tumors
from .vocabulary import BODY, LABELS, TUMORS

ZOOM = (0.99, 1.01)
DISPLACEMENT = (0.5, 1.1)  # mm, standard deviation
SMOOTHNESS = (5.0, 8.0)  # mm
CLOSING = 5  # voxels
# The share of a tumor that must be left inside of its organ, and in how many tries; then the next.
SHARES = ((0.8, 40), (0.75, 20))


@dataclass(frozen=True)
class Ranges:
    """
    How far a tumor goes at most, either way.

    Args:
        shift: mm along X, Y, Z.
        turn: degrees about X, Y, Z.
        scale: share of its size along X, Y, Z.
        is_elastic: whether it is also deformed.
    """

    shift: tuple[float, float, float]
    turn: tuple[float, float, float]
    scale: tuple[float, float, float]
    is_elastic: bool = True


RANGES: dict[int, Ranges] = {
    LABELS["lung tumor"]: Ranges((20.0, 20.0, 20.0), (5.0, 5.0, 180.0), (0.15, 0.15, 0.15)),
    LABELS["pancreatic tumor"]: Ranges((15.0, 15.0, 15.0), (5.0, 5.0, 5.0), (0.1, 0.1, 0.1)),
    LABELS["hepatic tumor"]: Ranges((10.0, 10.0, 10.0), (5.0, 5.0, 5.0), (0.2, 0.2, 0.2)),
    LABELS["colon cancer primaries"]: Ranges((5.0, 5.0, 5.0), (5.0, 5.0, 5.0), (0.1, 0.1, 0.1)),
    LABELS["bone lesion"]: Ranges((5.0, 5.0, 0.0), (0.0, 0.0, 5.7), (0.15, 0.15, 0.0), is_elastic=False),
}
OF_OTHERS = RANGES[LABELS["hepatic tumor"]]  # a fine-tuned model's new tumors


@dataclass(frozen=True)
class MovedTumor:
    """
    What became of a tumor.

    Args:
        tumor: its label.
        is_moved: or left where it was, because nowhere enough of it was inside of its organ.
        tries: places that were tried.
        share: its volume afterwards, 1 for what it was.
    """

    tumor: int
    is_moved: bool
    tries: int
    share: float


def augment(
    labels: np.ndarray,
    spacing: tuple[float, float, float],
    generator: torch.Generator | None = None,
    tumors: Mapping[int, tuple[int, ...]] = TUMORS,
) -> tuple[np.ndarray, list[MovedTumor]]:
    """
    A variant of a label map. Without a tumor it is zoomed by 0.99 to 1.01; otherwise every tumor is moved, turned,
    scaled and deformed, where at least 0.8 of it (0.75 if need be) stays inside of its closed organ; the rest is cut
    off. Where it was, its organ is.

    Args:
        labels: uint8 (X, Y, Z) in MAISI's vocabulary; stays as it is.
        spacing: mm along X, Y, Z.
        generator: of all draws.
        tumors: tumor -> the labels it can sit in; a fine-tuned model may have more.

    Returns:
        the variant, and what became of every tumor.
    """
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (), generator=generator, device=device).item()
    rng = np.random.default_rng(seed)
    present = [tumor for tumor in tumors if (labels == tumor).any()]
    if not present:
        return zoom(labels, rng.uniform(*ZOOM)), []
    moved = []
    for tumor in present:
        labels, outcome = move_tumor(labels, tumor, spacing, rng, tumors[tumor])
        moved.append(outcome)
    return labels, moved


def zoom(labels: np.ndarray, factor: float) -> np.ndarray:
    """A label map (X, Y, Z) enlarged about its middle, on the same grid; what comes in from outside is as the border
    is, so that a body that goes on beyond the first and the last slice still does (as MONAI's RandZoom)."""
    indices = []
    for n in labels.shape:
        index = np.rint((np.arange(n) - (n - 1) / 2) / factor + (n - 1) / 2).astype(int)
        indices.append(index.clip(0, n - 1))
    return labels[np.ix_(*indices)]


def move_tumor(
    labels: np.ndarray,
    tumor: int,
    spacing: tuple[float, float, float],
    rng: np.random.Generator,
    organs: tuple[int, ...],
) -> tuple[np.ndarray, MovedTumor]:
    """
    A label map whose tumor is elsewhere in its organ.

    Args:
        labels: uint8 (X, Y, Z), which has the tumor.
        tumor: its label.
        spacing: mm along X, Y, Z.
        rng: of all draws.
        organs: labels that it can sit in.
    """
    ranges = RANGES.get(tumor, OF_OTHERS)
    box = reachable_box(labels == tumor, spacing, ranges)
    view = labels[box]
    is_tumor = view == tumor
    voxels = np.count_nonzero(is_tumor)
    healthy = np.where(is_tumor, remove_tumors(view, spacing, {tumor: organs}), view)  # cysts stay
    organ = close(np.isin(healthy, organs), CLOSING)
    room = organ & np.isin(healthy, [BODY, *organs])

    tries = 0
    for share, more_tries in SHARES:
        for _ in range(more_tries):
            tries += 1
            moved = deform(is_tumor, spacing, ranges, rng) & room
            if np.count_nonzero(moved) < share * voxels:
                continue
            moved |= close(moved, CLOSING) & room
            result = labels.copy()
            result[box] = np.where(moved, tumor, healthy)
            return result, MovedTumor(tumor, True, tries, np.count_nonzero(moved) / voxels)
    return labels.copy(), MovedTumor(tumor, False, tries, 1.0)


def reachable_box(
    is_tumor: np.ndarray, spacing: tuple[float, float, float], ranges: Ranges
) -> tuple[slice, slice, slice]:
    """The part of a volume that a tumor can get to, with some voxels of its surroundings."""
    (own,) = ndimage.find_objects(is_tumor.astype(np.uint8))
    lengths = [(s.stop - s.start) * mm for s, mm in zip(own, spacing)]
    # However it turns, it is within its diagonal.
    reach = max(lengths) if not any(ranges.turn) else float(np.linalg.norm(lengths))
    box = []
    for s, n, mm, length, shift, scale in zip(own, is_tumor.shape, spacing, lengths, ranges.shift, ranges.scale):
        margin = (reach * (1 + scale) - length) / 2 + shift + 3 * DISPLACEMENT[1]
        voxels = int(np.ceil(margin / mm)) + CLOSING
        box.append(slice(max(s.start - voxels, 0), min(s.stop + voxels, n)))
    return tuple(box)


def deform(
    is_tumor: np.ndarray, spacing: tuple[float, float, float], ranges: Ranges, rng: np.random.Generator
) -> np.ndarray:
    """A mask (X, Y, Z) scaled, turned about its centre, shifted, and deformed."""
    shift, turn, scale = (rng.uniform(-1, 1, 3) * limit for limit in (ranges.shift, ranges.turn, ranges.scale))
    spacing = np.array(spacing)
    centre = np.argwhere(is_tumor).mean(0) * spacing
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in is_tumor.shape), indexing="ij"), axis=-1) * spacing
    # Where every voxel comes from.
    source = Rotation.from_euler("xyz", turn, degrees=True).apply((grid - centre - shift).reshape(-1, 3), inverse=True)
    source = (source / (1 + scale) + centre).reshape(grid.shape)
    if ranges.is_elastic:
        sigma = rng.uniform(*SMOOTHNESS) / spacing
        noise = [ndimage.gaussian_filter(rng.standard_normal(is_tumor.shape), sigma, mode="reflect") for _ in range(3)]
        source += np.stack([rng.uniform(*DISPLACEMENT) * field / (field.std() or 1.0) for field in noise], axis=-1)
    coordinates = np.moveaxis(source / spacing, -1, 0)
    return ndimage.map_coordinates(is_tumor.astype(np.float32), coordinates, order=1) > 0.5
