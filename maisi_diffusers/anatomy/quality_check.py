"""Whether a synthetic CT looks like one: the median HU of its organs."""

from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

from .vocabulary import BONES, LABELS, LUNG_LOBES, label_index

QUALITY_THRESHOLDS: dict[str, tuple[float, float]] = {
    "liver": (-22, 162),
    "spleen": (-43, 184),
    "pancreas": (-57, 150),
    "kidney": (-131, 267),
    "lung": (-1089, -367),
    "brain": (-951, 370),
    "bone": (71, 1000),
}
"""Organ -> lowest and highest median in HU of the training data (published)."""

ORGAN_LABELS: dict[str, tuple[int, ...]] = {
    "kidney": (LABELS["right kidney"], LABELS["left kidney"]),
    "lung": LUNG_LOBES,
    "bone": BONES,
}
"""Labels of the organs that are several."""


def check_quality(
    image_hu: np.ndarray,
    labels: np.ndarray,
    thresholds: Mapping[str, Sequence[float]] | None = None,
    vocabulary: Mapping[str, int] = LABELS,
) -> dict:
    """Check the median HU of the organs of a synthetic CT against the range it may have.

    Args:
        image_hu: CT (X, Y, Z) in HU.
        labels: label map (X, Y, Z), uint8, in MAISI's vocabulary.
        thresholds: organ -> lowest and highest median; [`QUALITY_THRESHOLDS`] if not given. An organ is "kidney",
            "lung", "bone", or a name of the vocabulary.
        vocabulary: name -> label; a fine-tuned model has its own.

    Returns:
        `{"passed": bool, "organs": {organ: {"median": HU, "low": HU, "high": HU, "passed": bool}}}`, as JSON has it.
        An organ that the label map does not have is left out.

    Raises:
        ValueError: if image and labels differ in shape; for an organ or a range that is none.

    Example:

    ```py
    >>> import numpy as np
    >>> from maisi_diffusers.anatomy import check_quality

    >>> report = check_quality(np.full((4, 4, 4), -2000.0), np.full((4, 4, 4), 1, dtype=np.uint8))
    >>> report["passed"], report["organs"]["liver"]["median"]
    (False, -2000.0)
    ```
    """
    if image_hu.shape != labels.shape or labels.ndim != 3:
        raise ValueError(
            f"The image has shape {image_hu.shape} and the labels {labels.shape}; give both on one grid (X, Y, Z)."
        )
    organs = {}
    for organ, limits in (QUALITY_THRESHOLDS if thresholds is None else thresholds).items():
        low, high = check_range(organ, limits)
        indices = ORGAN_LABELS[organ] if organ in ORGAN_LABELS else (label_index(organ, vocabulary),)
        table = np.zeros(256, dtype=bool)
        table[list(indices)] = True
        voxels = image_hu[table[labels]]
        if voxels.size:
            median = float(np.median(voxels))
            organs[organ] = {"median": median, "low": low, "high": high, "passed": low <= median <= high}
    return {"passed": all(found["passed"] for found in organs.values()), "organs": organs}


def check_range(organ: str, limits: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest median of an organ; raises a `ValueError` where they are none."""
    if (
        not isinstance(limits, Sequence)
        or len(limits) != 2
        or not all(isinstance(limit, Real) for limit in limits)
        or not limits[0] <= limits[1]
    ):
        raise ValueError(f"The median of {organ!r} cannot have range {limits!r}; give the lowest and the highest HU.")
    return float(limits[0]), float(limits[1])


def describe_outliers(quality: Mapping, attempts: int) -> str:
    """What to say of an image that did not pass, after so many attempts."""
    outliers = [
        f"the median of {organ} is {found['median']:g} HU, which should be {found['low']:g} to {found['high']:g}"
        for organ, found in quality["organs"].items()
        if not found["passed"]
    ]
    times = f" in the last of {attempts} attempts" if attempts > 1 else ""
    return f"{', '.join(outliers)}{times}; another seed, size or spacing may do better"
