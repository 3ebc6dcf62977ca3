"""Label maps in, in MAISI's vocabulary."""

import warnings
from collections.abc import Iterable
from os import PathLike

import nibabel as nib
import numpy as np

from ..imaging.nifti import load_volume
from .totalsegmentator import totalsegmentator_to_maisi
from .vocabulary import LABELS, labels_present

# Dummies of MAISI; right kidney, small bowel and colon in TotalSegmentator's `total`.
TOTALSEGMENTATOR_MARKS = {2, 18, 20}


def load_label_map(source: str | PathLike | nib.Nifti1Image, vocabulary: str = "maisi") -> nib.Nifti1Image:
    """Read a label map and bring its labels into MAISI's vocabulary.

    Args:
        source: path of a .nii or .nii.gz file, or an image, of integers.
        vocabulary: what its labels mean: "maisi", or "totalsegmentator" for TotalSegmentator v2's task `total`.

    Returns:
        The image (X, Y, Z) as uint8 with its affine and orientation as they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for what [`load_volume`] refuses, another vocabulary, floating-point labels, labels that the
            vocabulary does not have, and a map without any label.
    """
    if vocabulary not in ("maisi", "totalsegmentator"):
        raise ValueError(f"Label vocabulary {vocabulary!r} is unknown; use 'maisi' or 'totalsegmentator'.")
    image = load_volume(source)
    name = "The label map" if isinstance(source, nib.Nifti1Image) else f"{str(source)!r}"
    labels = np.asanyarray(image.dataobj)
    if labels.dtype.kind == "f":
        raise ValueError(
            f"{name} holds floating-point labels, must hold integers (and no scl_slope); check that it is a label "
            "map, then save it as np.round(labels).astype(np.uint8)."
        )
    low, high = labels.min(), labels.max()
    if low < 0 or high > 255:
        wrong = np.unique(labels[(labels < 0) | (labels > 255)])
        raise ValueError(f"{name} holds labels {_some(wrong)}, must be 0..255; relabel them.")
    labels = labels.astype(np.uint8, copy=False)
    if high == 0:
        raise ValueError(f"{name} holds no label, only background; check that it is a label map of this anatomy.")

    if vocabulary == "totalsegmentator":
        labels = totalsegmentator_to_maisi(labels)
    present = set(labels_present(labels))
    unknown = present - set(LABELS.values())
    if unknown:
        raise ValueError(
            f"{name} holds labels {_some(sorted(unknown))}, which MAISI's vocabulary does not have (it has 1 to 132, "
            "and 200 for body); relabel them, to 200 if in doubt."
        )
    if vocabulary == "maisi" and TOTALSEGMENTATOR_MARKS <= present:
        warnings.warn(
            f"{name} holds labels {sorted(TOTALSEGMENTATOR_MARKS)}, which are free in MAISI's vocabulary, but kidney "
            "and bowels in TotalSegmentator's; if it is from there, read it as 'totalsegmentator'.",
            UserWarning,
            stacklevel=2,
        )
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    return type(image)(labels, image.affine, header)


def _some(labels: Iterable[int]) -> str:
    labels = [int(label) for label in labels]
    return f"{labels}" if len(labels) <= 8 else f"{labels[:8]} and {len(labels) - 8} more"
