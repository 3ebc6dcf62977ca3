"""Label maps as the mask VAE has them: which labels, and which output stands for which."""

import os
from collections.abc import Iterable

import nibabel as nib
import numpy as np
import torch

from ..anatomy import LABELS, MASK_VAE_LABELS, labels_present, load_label_map
from ..imaging import to_ras

# A cyst is part of its kidney: the mask VAE has no output for it.
MERGED = {
    LABELS["left kidney cyst"]: LABELS["left kidney"],
    LABELS["right kidney cyst"]: LABELS["right kidney"],
}

_CLASS_OF_LABEL = torch.zeros(256, dtype=torch.int64)
_CLASS_OF_LABEL[list(MASK_VAE_LABELS)] = torch.arange(len(MASK_VAE_LABELS))


def load_mask_labels(path: str | os.PathLike) -> nib.Nifti1Image:
    """
    Read a label map to train or run the mask VAE on: kidney cysts become their kidney.

    Args:
        path: of a label map in MAISI's vocabulary.

    Returns:
        uint8 (X, Y, Z) in RAS+, of labels in [`MASK_VAE_LABELS`].

    Raises:
        FileNotFoundError, ValueError: what [`load_label_map`] and [`check_mask_labels`] refuse.
    """
    image = to_ras(load_label_map(path))
    labels = np.array(image.dataobj)
    for label, organ in MERGED.items():
        labels[labels == label] = organ
    check_mask_labels(labels_present(labels), f"'{path}'")
    return nib.Nifti1Image(labels, image.affine)


def check_mask_labels(labels: Iterable[int], name: str) -> None:
    """
    Refuse labels that are not among the mask VAE's, cysts apart. Seven of those free for new classes are not, and what
    such a class should be in a map without it only its maker can tell.

    Args:
        labels: what the map has.
        name: of what has them, for the error.

    Raises:
        ValueError: naming the labels.
    """
    lacking = sorted(set(labels) - set(MASK_VAE_LABELS) - MERGED.keys())
    if lacking:
        raise ValueError(
            f"{name} has labels {lacking}, which the mask VAE has no output for: give a new class index 129, the only "
            "free one it has, or relabel them to the organ around them (body: 200)"
        )


def mask_classes(labels: torch.Tensor) -> torch.Tensor:
    """Labels of [`MASK_VAE_LABELS`], uint8 of any shape, to the outputs of the mask VAE that stand for them, int64."""
    return _CLASS_OF_LABEL.to(labels.device)[labels.long()]
