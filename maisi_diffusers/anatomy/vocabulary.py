"""The label vocabulary of MAISI: which integer of a label map is which structure.

Names and numbers are those of the published models (`label_dict.json` of NVIDIA's MAISI release); left and right are
the patient's. 0 is background and has no name here.
"""

import difflib
from collections.abc import Mapping

import numpy as np


def _number(first: int, names: list[str]) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(names)}


LABELS: dict[str, int] = {
    **_number(1, ["liver", "dummy1", "spleen", "pancreas", "right kidney", "aorta", "inferior vena cava"]),
    **_number(8, ["right adrenal gland", "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum"]),
    **_number(14, ["left kidney", "bladder", "dummy2", "portal vein and splenic vein", "dummy3", "small bowel"]),
    **_number(20, ["dummy4", "dummy5", "brain", "lung tumor", "pancreatic tumor", "hepatic vessel", "hepatic tumor"]),
    **_number(27, ["colon cancer primaries", "left lung upper lobe", "left lung lower lobe"]),
    **_number(30, ["right lung upper lobe", "right lung middle lobe", "right lung lower lobe"]),
    # The spine is numbered from the lumbar vertebrae up, each section from its last vertebra to its first.
    **_number(33, [f"vertebrae L{i}" for i in range(5, 0, -1)]),
    **_number(38, [f"vertebrae T{i}" for i in range(12, 0, -1)]),
    **_number(50, [f"vertebrae C{i}" for i in range(7, 0, -1)]),
    **_number(57, ["trachea", "left iliac artery", "right iliac artery", "left iliac vena", "right iliac vena"]),
    **_number(62, ["colon"]),
    **_number(63, [f"left rib {i}" for i in range(1, 13)]),
    **_number(75, [f"right rib {i}" for i in range(1, 13)]),
    **_number(87, ["left humerus", "right humerus", "left scapula", "right scapula", "left clavicula"]),
    **_number(92, ["right clavicula", "left femur", "right femur", "left hip", "right hip", "sacrum"]),
    **_number(98, ["left gluteus maximus", "right gluteus maximus", "left gluteus medius", "right gluteus medius"]),
    **_number(102, ["left gluteus minimus", "right gluteus minimus", "left autochthon", "right autochthon"]),
    **_number(106, ["left iliopsoas", "right iliopsoas", "left atrial appendage", "brachiocephalic trunk"]),
    **_number(110, ["left brachiocephalic vein", "right brachiocephalic vein", "left common carotid artery"]),
    **_number(113, ["right common carotid artery", "costal cartilages", "heart", "left kidney cyst"]),
    **_number(117, ["right kidney cyst", "prostate", "pulmonary vein", "skull", "spinal cord", "sternum"]),
    **_number(123, ["left subclavian artery", "right subclavian artery", "superior vena cava", "thyroid gland"]),
    **_number(127, ["vertebrae S1", "bone lesion", "dummy6", "dummy7", "dummy8", "airway"]),
    "body": 200,
}

BODY = LABELS["body"]
"""Every voxel of the body that no other label claims. The released ControlNets need it."""

DUMMIES: tuple[int, ...] = tuple(LABELS[f"dummy{i}"] for i in range(1, 9))
"""Labels the published models never used, free for the new classes of a fine-tuned model."""

LUNG_LOBES: tuple[int, ...] = tuple(range(28, 33))

BONES: tuple[int, ...] = (*range(33, 57), *range(63, 98), LABELS["skull"], LABELS["sternum"], LABELS["vertebrae S1"])

TUMORS: dict[int, tuple[int, ...]] = {
    LABELS["lung tumor"]: LUNG_LOBES,
    LABELS["pancreatic tumor"]: (LABELS["pancreas"],),
    LABELS["hepatic tumor"]: (LABELS["liver"],),
    LABELS["colon cancer primaries"]: (LABELS["colon"],),
    LABELS["bone lesion"]: BONES,
}
"""Tumor -> the labels it can sit in."""

CONTROLLABLE_ANATOMY: tuple[str, ...] = (
    "gallbladder",
    "liver",
    "stomach",
    "pancreas",
    "colon",
    "lung tumor",
    "pancreatic tumor",
    "hepatic tumor",
    "colon cancer primaries",
    "bone lesion",
)
"""The five organs and five tumors whose size the mask model takes, in the order of its input vector."""

_ABSENT_FROM_MASK_VAE = {2, 16, 18, 20, 21, 116, 117, 130, 131}
MASK_VAE_LABELS: tuple[int, ...] = (0, *(i for i in LABELS.values() if i not in _ABSENT_FROM_MASK_VAE))
"""Output channel of the mask VAE -> label: background, the vocabulary in order without nine labels, body (125)."""


def label_index(label: str | int, labels: Mapping[str, int] = LABELS) -> int:
    """Label of an anatomy given by name or by number.

    Args:
        label: a name of the vocabulary ("vertebrae L5"), or a label that one of them stands for.
        labels: the vocabulary, name -> label; a fine-tuned model may have its own.

    Raises:
        ValueError: if the vocabulary has no such name or number; for a name the nearest ones are suggested.
    """
    if not isinstance(label, str):
        return labels[label_name(label, labels)]
    if label not in labels:
        folded = {name.casefold(): name for name in labels}
        near = difflib.get_close_matches(label.casefold(), folded, n=3, cutoff=0.5)
        hint = " or ".join(repr(folded[name]) for name in near) or "a name from maisi_diffusers.anatomy.LABELS"
        raise ValueError(f"No anatomy is called {label!r}; use {hint}.")
    return labels[label]


def label_name(index: int, labels: Mapping[str, int] = LABELS) -> str:
    """Name of a label.

    Raises:
        ValueError: if the vocabulary has no such label.
    """
    for name, number in labels.items():
        if number == index:
            return name
    raise ValueError(f"No anatomy has label {index}; use a number from maisi_diffusers.anatomy.LABELS (1..132, 200).")


def labels_present(labels: np.ndarray) -> tuple[int, ...]:
    """Labels other than background in a uint8 label map of any shape, ascending."""
    present = np.zeros(256, dtype=bool)
    # Plane by plane, since indexing with the whole volume would make an 8-byte copy of it, and in the order of memory,
    # which in a NIfTI file is the reverse of numpy's.
    for plane in labels.T if labels.flags.f_contiguous else labels:
        present[plane] = True
    return tuple(int(label) for label in np.flatnonzero(present[1:]) + 1)


def new_vocabulary(label_names: Mapping[str, int]) -> dict[str, int]:
    """MAISI's vocabulary with new classes in the place of its dummies, name -> label.

    Args:
        label_names: name -> index of each new class, e.g. `{"kidney tumor": 129}`.

    Raises:
        ValueError: for a name that the vocabulary has, and for an index that is not one of its eight free ones or is
            given twice.
    """
    vocabulary = dict(LABELS)
    for name, index in label_names.items():
        if name in LABELS:
            raise ValueError(
                f"The vocabulary has {name!r} already, as {LABELS[name]}; give the new class another name."
            )
        if index not in DUMMIES or isinstance(index, bool):
            raise ValueError(f"New class {name!r} cannot have index {index!r}; the free ones are {list(DUMMIES)}.")
        dummy = label_name(index)
        if dummy not in vocabulary:
            raise ValueError(f"New class {name!r} has index {index}, which another one has too; give each its own.")
        del vocabulary[dummy]
        vocabulary[name] = index
    return vocabulary
