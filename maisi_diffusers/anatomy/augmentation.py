"""Variants of a label map: zoomed a little, or with its tumor moved and deformed inside of its organ.

Rules and ranges are the published ones, in mm instead of voxels of about 1 mm, but for the closing of organs; and a
tumor turns about its own centre and not about the volume's, never grows over another organ, and the search for a place
for it ends.
"""

from collections.abc import Iterator, Mapping
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
FARTHEST = 4  # standard deviations, beyond which a Gaussian is as good as nothing
CLOSING = 5  # voxels
BLOCK = 8  # voxels along each axis; pieces of a tumor are told apart by such blocks
SLAB = 2**18  # voxels that are looked up at once
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
class Placement:
    """
    Where a tumor goes: its voxel `v` to `matrix @ v + offset`, before it is deformed.

    Args:
        matrix: (3, 3).
        offset: voxels along X, Y, Z.
    """

    matrix: np.ndarray
    offset: np.ndarray


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
    A label map whose tumor is elsewhere in its organ. The pieces of a tumor are moved as one, but only where they can
    get to is looked at: time and memory do not grow with how far apart they are.

    Args:
        labels: uint8 (X, Y, Z), which has the tumor.
        tumor: its label.
        spacing: mm along X, Y, Z.
        rng: of all draws.
        organs: labels that it can sit in.
    """
    ranges = RANGES.get(tumor, OF_OTHERS)
    is_tumor = labels == tumor
    voxels = np.argwhere(is_tumor)
    shares = [share for share, tries in SHARES for _ in range(tries)]
    placements = [draw_placement(voxels.mean(0), spacing, ranges, rng) for _ in shares]
    pieces = piece_boxes(voxels)
    boxes = [moved_boxes(pieces, placement, spacing, labels.shape) for placement in placements]
    regions = reachable_regions([pieces, *boxes], labels.shape)

    healthy, room = np.copy(labels), np.zeros_like(is_tumor)
    for region in regions:
        view, was_tumor = healthy[region], is_tumor[region]
        view[was_tumor] = remove_tumors(view, spacing, {tumor: organs})[was_tumor]  # cysts stay
        room[region] = close(np.isin(view, organs), CLOSING) & np.isin(view, [BODY, *organs])

    for tries, (share, placement, at) in enumerate(zip(shares, placements, boxes), start=1):
        field = ElasticField(at, spacing, rng) if ranges.is_elastic else None
        moved = deform(is_tumor, placement, field, at, room)
        if sum(np.count_nonzero(moved[region]) for region in regions) < share * len(voxels):
            continue
        for region in regions:
            moved[region] |= close(moved[region], CLOSING) & room[region]
        healthy[moved] = tumor
        return healthy, MovedTumor(tumor, True, tries, np.count_nonzero(moved) / len(voxels))
    return np.copy(labels), MovedTumor(tumor, False, len(shares), 1.0)


def draw_placement(
    centre: np.ndarray, spacing: tuple[float, float, float], ranges: Ranges, rng: np.random.Generator
) -> Placement:
    """A tumor scaled, turned about its centre (in voxels along X, Y, Z), and shifted."""
    shift, turn, scale = (rng.uniform(-1, 1, 3) * limit for limit in (ranges.shift, ranges.turn, ranges.scale))
    spacing = np.array(spacing)
    matrix = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() * (1 + scale)
    matrix = matrix * spacing / spacing[:, None]  # of mm -> of voxels
    return Placement(matrix, centre - matrix @ centre + shift / spacing)


def piece_boxes(voxels: np.ndarray) -> np.ndarray:
    """Boxes (n, 2, 3), from and up to where along X, Y, Z, of the pieces of a tumor, whose voxels (n, 3) are given;
    pieces that are near each other count as one."""
    blocks = np.zeros(voxels.max(0) // BLOCK + 1, dtype=bool)
    blocks[tuple((voxels // BLOCK).T)] = True
    pieces, count = ndimage.label(blocks, np.ones((3, 3, 3)))
    piece_of = pieces[tuple((voxels // BLOCK).T)]
    parts = (voxels[piece_of == piece] for piece in range(1, count + 1))
    return np.array([[part.min(0), part.max(0) + 1] for part in parts])


def moved_boxes(
    boxes: np.ndarray, placement: Placement, spacing: tuple[float, float, float], shape: tuple[int, int, int]
) -> np.ndarray:
    """Boxes (n, 2, 3) around what is in these once it is placed and deformed, as far as it is in the volume."""
    middle = (boxes[:, 0] + boxes[:, 1] - 1) / 2 @ placement.matrix.T + placement.offset
    half = (boxes[:, 1] - boxes[:, 0] + 1) / 2 + FARTHEST * DISPLACEMENT[1] / np.array(spacing)
    half = half @ abs(placement.matrix).T
    return np.stack([np.floor(middle - half), np.ceil(middle + half) + 1], axis=1).clip(0, shape).astype(int)


def reachable_regions(boxes: list[np.ndarray], shape: tuple[int, int, int]) -> list[tuple[slice, slice, slice]]:
    """Where the pieces of a tumor can get to, whose boxes (n, 2, 3) are given for every place, with some voxels of the
    surroundings. Regions that overlap have become one, so that none do."""
    starts = (np.min(boxes, axis=0)[:, 0] - CLOSING).clip(0)
    stops = (np.max(boxes, axis=0)[:, 1] + CLOSING).clip(max=shape)
    regions = []
    for start, stop in zip(starts.tolist(), stops.tolist()):
        region = tuple(map(slice, start, stop))
        while near := [other for other in regions if overlap(region, other)]:
            regions = [other for other in regions if other not in near]
            axes = zip(region, *near)
            region = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in axes)
        regions.append(region)
    return regions


def overlap(one: tuple[slice, slice, slice], other: tuple[slice, slice, slice]) -> bool:
    """Whether two boxes have a voxel in common."""
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other))


class ElasticField:
    """
    Displacements that vary smoothly: white noise under a Gaussian. As this is smooth, the noise is drawn at points a
    standard deviation apart, and not at every voxel.

    Args:
        boxes: (n, 2, 3), from and up to which voxel along X, Y, Z it is wanted.
        spacing: mm along X, Y, Z.
        rng: of all draws.
    """

    def __init__(self, boxes: np.ndarray, spacing: tuple[float, float, float], rng: np.random.Generator):
        self.start = boxes[:, 0].min(0)
        self.step = np.array(spacing) / rng.uniform(*SMOOTHNESS)  # points a voxel
        amplitude = rng.uniform(*DISPLACEMENT, 3) / spacing
        points = ((boxes[:, 1].max(0) - self.start) * self.step).astype(int) + 2 * FARTHEST + 1
        self.noise = rng.standard_normal((3, *points)) * amplitude[:, None, None, None]

    def __call__(self, box: tuple[slice, slice, slice]) -> np.ndarray:
        """Voxels along X, Y, Z (3, X, Y, Z) by which those in a box are displaced."""
        field = self.noise
        for along, start, step in zip(box, self.start, self.step):
            places = (np.arange(along.start, along.stop) - start) * step + FARTHEST
            points = np.arange(int(places[0]) - FARTHEST, int(places[-1]) + FARTHEST + 1)
            distance = places[:, None] - points
            weights = np.exp(-(distance**2) / 2) * (abs(distance) <= FARTHEST)
            weights /= np.linalg.norm(weights, axis=1, keepdims=True)  # so that its deviation is the noise's
            field = np.tensordot(field[:, points], weights, axes=(1, 1))  # moves the axis to the end
        return field


def deform(
    is_tumor: np.ndarray,
    placement: Placement,
    field: ElasticField | None,
    boxes: np.ndarray,
    room: np.ndarray,
) -> np.ndarray:
    """
    What of a tumor is in its room, once it is elsewhere.

    Args:
        is_tumor: mask (X, Y, Z).
        placement: where it goes.
        field: that deforms it.
        boxes: (n, 2, 3), from and up to where along X, Y, Z all of it gets; no other voxel is looked at.
        room: mask (X, Y, Z).
    """
    inverse = np.linalg.inv(placement.matrix)
    rows = np.column_stack([inverse, -inverse @ placement.offset])
    moved = np.zeros(is_tumor.shape, dtype=bool)
    for slab in slabs(boxes):
        inside = room[slab]
        x, y, z = np.ogrid[slab]
        source = np.stack([(a * x + b * y + d) + c * z for a, b, c, d in rows])  # where every voxel comes from
        if field is not None:
            source += field(slab)
        moved[slab][inside] = ndimage.map_coordinates(is_tumor, source[:, inside], order=0)
    return moved


def slabs(boxes: np.ndarray) -> Iterator[tuple[slice, slice, slice]]:
    """Boxes (n, 2, 3) cut along X, so that memory is bounded."""
    for start, stop in boxes[(boxes[:, 0] < boxes[:, 1]).all(1)].tolist():
        thickness = max(SLAB // ((stop[1] - start[1]) * (stop[2] - start[2])), 1)
        for x in range(start[0], stop[0], thickness):
            yield slice(x, min(x + thickness, stop[0])), slice(start[1], stop[1]), slice(start[2], stop[2])
