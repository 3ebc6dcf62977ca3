"""What a generated label map gets wrong, put right: the published rules, one function a rule.

A rule changes the label map (X, Y, Z), uint8 in MAISI's vocabulary, in place. Every organ is looked at in its own box,
so that a label costs what it occupies and not the whole volume.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import cc3d
import numpy as np
from scipy import ndimage

from .closing import close
from .pieces import largest_piece
from .tumors import remove_tumors
from .vocabulary import BODY, LABELS, LUNG_LOBES, TUMORS, label_index

# Organs that are in one piece.
SINGLE_ORGANS: tuple[int, ...] = (
    *map(label_index, ("liver", "spleen", "pancreas", "right kidney", "left kidney", "aorta", "inferior vena cava")),
    *map(label_index, ("right adrenal gland", "left adrenal gland", "gallbladder", "stomach", "duodenum")),
    *LUNG_LOBES,
)
VERTEBRAE: tuple[int, ...] = tuple(range(LABELS["vertebrae L5"], LABELS["vertebrae C1"] + 1))
INTESTINES: tuple[int, ...] = tuple(map(label_index, ("stomach", "duodenum", "small bowel", "colon")))
BOWELS: tuple[int, ...] = INTESTINES[2:]
BONE_LESION = LABELS["bone lesion"]
# Tumors that may be in several places of their organ.
SCATTERED_TUMORS = (LABELS["hepatic tumor"], BONE_LESION)
REACH = 3  # voxels around a tumor's organ in which what was taken from others becomes the organ
CUBE = np.ones((3, 3, 3), dtype=bool)


@dataclass
class CleanUpReport:
    """
    What was done, in voxels.

    Args:
        off_body: apart from the body, now background.
        other_tumors: of tumors that were not asked for, now their organ, or body.
        tumor_pieces: of the tumor that was asked for, apart from its largest piece or its organ, now organ or body.
        organ_pieces: label -> apart from its largest piece, now body.
        off_intestines: label -> bowel apart from the intestines, now body.
        closed: label -> body that is now the organ.
    """

    off_body: int = 0
    other_tumors: int = 0
    tumor_pieces: int = 0
    organ_pieces: dict[int, int] = field(default_factory=dict)
    off_intestines: dict[int, int] = field(default_factory=dict)
    closed: dict[int, int] = field(default_factory=dict)


def clean_up(labels: np.ndarray, tumor: int | None = None) -> tuple[np.ndarray, CleanUpReport]:
    """
    Clean a generated label map up, by the published rules.

    1. Hepatic vessels become liver.
    2. There is one body: what is apart from its largest piece becomes background.
    3. Tumors that were not asked for become their organ, a bone lesion body.
    4. The tumor that was asked for closes its gaps, touches its organ, and is one piece, but for a hepatic tumor and a
       bone lesion. Other pieces become the organ where they touch it, else body.
    5. Single organs, and unless a bone lesion was asked for the vertebrae, are one piece; other pieces become body.
    6. Small bowel and colon that do not hang together with the intestines become body.
    7. What 5 and 6 took away beside the tumor's organ becomes that organ.
    8. Single organs close: body in their gaps becomes theirs. No other organ does, and the airway stays as it is.

    Args:
        labels: uint8 (X, Y, Z) in MAISI's vocabulary; stays as it is.
        tumor: label of the tumor that was asked for, if any.

    Returns:
        the clean label map, and what was done.

    Raises:
        ValueError: if `tumor` is none.

    Example:

    ```py
    >>> import numpy as np
    >>> from maisi_diffusers.anatomy import clean_up

    >>> labels = np.full((16, 16, 16), 200, dtype=np.uint8)
    >>> labels[4:9, 4:9, 4:9] = labels[12, 12, 12] = 3
    >>> clean, report = clean_up(labels)
    >>> report.organ_pieces
    {3: 1}
    ```
    """
    if tumor is not None and tumor not in TUMORS:
        raise ValueError(f"tumor={tumor} is no tumor: give one of {', '.join(map(str, TUMORS))}, or None")
    single = SINGLE_ORGANS if tumor == BONE_LESION else SINGLE_ORGANS + VERTEBRAE
    labels, report = labels.copy(), CleanUpReport()
    labels[labels == LABELS["hepatic vessel"]] = LABELS["liver"]
    report.off_body = keep_one_body(labels)
    report.other_tumors = remove_other_tumors(labels, tumor)
    report.tumor_pieces = 0 if tumor is None else keep_one_tumor(labels, tumor)
    before = labels.copy()
    report.organ_pieces = keep_largest_pieces(labels, single)
    report.off_intestines = keep_one_intestine(labels)
    if tumor is not None:
        refill_organ_of_tumor(labels, tumor, before != labels)
    report.closed = close_organs(labels, single)
    return labels, report


def keep_one_body(labels: np.ndarray) -> int:
    """Make background of what is apart from the largest piece of the body, be it by a bridge of two voxels."""
    inside = ndimage.minimum_filter((labels > 0).astype(np.uint8), size=3, mode="constant")
    body = ndimage.maximum_filter(largest_piece(inside).astype(np.uint8), size=3, mode="constant")
    apart = (labels > 0) & (body == 0)
    labels[apart] = 0
    return int(apart.sum())


def remove_other_tumors(labels: np.ndarray, tumor: int | None) -> int:
    """Make organ of the tumors that were not asked for, of a bone lesion body."""
    others = [other for other in TUMORS if other != tumor]
    found = np.isin(labels, others)
    if found.any():
        organs = {other: (BODY,) if other == BONE_LESION else TUMORS[other] for other in others}
        labels[found] = remove_tumors(labels, tumors=organs)[found]
    return int(found.sum())


def keep_one_tumor(labels: np.ndarray, tumor: int) -> int:
    """Close a tumor's gaps and, of the pieces that touch its organ, keep the largest, or all where it may be
    scattered."""
    boxes = find_boxes(labels, [tumor], margin=2)
    if not boxes:
        return 0
    view = labels[boxes[tumor]]
    organs = TUMORS[tumor]
    gaps = close(view == tumor, 3) & np.isin(view, [BODY, *organs])
    view[gaps] = tumor

    near_organ = ndimage.binary_dilation(np.isin(view, organs), CUBE)
    pieces, count = cc3d.connected_components(view == tumor, connectivity=26, return_N=True)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    touching = np.flatnonzero(np.bincount(pieces[near_organ], minlength=count + 1) * (sizes > 0))
    if not len(touching) or tumor in SCATTERED_TUMORS:
        kept = touching
    else:
        kept = touching[[sizes[touching].argmax()]]
    apart = (pieces > 0) & ~np.isin(pieces, kept)
    in_organ = apart & np.isin(pieces, touching)
    healthy = remove_tumors(view, tumors={tumor: organs})
    view[in_organ] = healthy[in_organ]
    view[apart & ~in_organ] = BODY
    return int(apart.sum())


def keep_largest_pieces(labels: np.ndarray, organs: Iterable[int]) -> dict[int, int]:
    """Make body of what is apart from the largest piece of each organ."""
    removed = {}
    for organ, box in find_boxes(labels, organs).items():
        view = labels[box]
        inside = view == organ
        apart = inside & ~largest_piece(inside)
        if apart.any():
            view[apart] = BODY
            removed[organ] = int(apart.sum())
    return removed


def keep_one_intestine(labels: np.ndarray) -> dict[int, int]:
    """Make body of small bowel and colon apart from the largest piece of stomach, duodenum and bowels together."""
    inside = np.isin(labels, INTESTINES)
    apart = inside & ~largest_piece(inside)
    removed = {}
    for bowel in BOWELS:
        of_bowel = apart & (labels == bowel)
        if of_bowel.any():
            labels[of_bowel] = BODY
            removed[bowel] = int(of_bowel.sum())
    return removed


def refill_organ_of_tumor(labels: np.ndarray, tumor: int, removed: np.ndarray) -> None:
    """Make a tumor's organ of what was taken from others beside it; of several organs the one that most of the tumor's
    surroundings are of."""
    boxes = find_boxes(labels, [tumor], margin=2)
    if not boxes or tumor == BONE_LESION:
        return
    view = labels[boxes[tumor]]
    around = ndimage.binary_dilation(view == tumor, CUBE) & np.isin(view, TUMORS[tumor])
    if not around.any():
        return
    organ = int(np.bincount(view[around]).argmax())
    box = find_boxes(labels, [organ], margin=REACH)[organ]
    near = ndimage.binary_dilation(labels[box] == organ, CUBE, iterations=REACH)
    labels[box][near & removed[box] & (labels[box] == BODY)] = organ


def close_organs(labels: np.ndarray, organs: Iterable[int]) -> dict[int, int]:
    """Make organ of the body in the gaps of each, of up to two voxels."""
    closed = {}
    for organ, box in find_boxes(labels, organs, margin=2).items():
        view = labels[box]
        gaps = close(view == organ, 3) & (view == BODY)
        if gaps.any():
            view[gaps] = organ
            closed[organ] = int(gaps.sum())
    return closed


def find_boxes(labels: np.ndarray, wanted: Iterable[int], margin: int = 0) -> dict[int, tuple[slice, ...]]:
    """Label -> the box that it is in, of those that are there, with a margin where the volume has it."""
    boxes = ndimage.find_objects(labels)
    return {
        label: tuple(
            slice(max(s.start - margin, 0), min(s.stop + margin, n)) for s, n in zip(boxes[label - 1], labels.shape)
        )
        for label in wanted
        if label <= len(boxes) and boxes[label - 1] is not None
    }
