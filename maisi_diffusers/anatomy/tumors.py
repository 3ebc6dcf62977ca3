"""The same anatomy without its tumors, which is what tumor guidance and the contrastive loss compare with."""

from collections.abc import Mapping

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from .vocabulary import BODY, LABELS, TUMORS

# A kidney cyst is no tumor of the vocabulary, but the published tumor-free masks close it too.
_KIDNEY_OF_CYST = {
    LABELS["left kidney cyst"]: LABELS["left kidney"],
    LABELS["right kidney cyst"]: LABELS["right kidney"],
}


def remove_tumors(
    labels: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    tumors: Mapping[int, tuple[int, ...]] = TUMORS,
) -> np.ndarray:
    """Tumor-free copy of a label map.

    Hepatic tumor becomes liver, pancreatic tumor pancreas, colon cancer primaries colon and a kidney cyst its kidney.
    A voxel of a lung tumor takes the nearest lung lobe, one of a bone lesion the nearest bone; where the map has none,
    body. Nothing else changes.

    Args:
        labels: uint8 (X, Y, Z) in MAISI's vocabulary.
        spacing: mm along each axis, which is what "nearest" is measured in.
        tumors: tumor -> the labels it can sit in; a fine-tuned model may have more.
    """
    table = np.arange(256, dtype=np.uint8)
    for tumor, organs in tumors.items():
        if len(organs) == 1:
            table[tumor] = organs[0]
    for cyst, kidney in _KIDNEY_OF_CYST.items():
        table[cyst] = kidney
    healthy = table[labels]

    for tumor, organs in tumors.items():
        is_tumor = healthy == tumor
        if not is_tumor.any():
            continue
        is_organ = np.isin(healthy, organs)
        if not is_organ.any():
            healthy[is_tumor] = BODY
            continue
        # The nearest voxel of an organ is on its surface, so a tree of the surface stands in for a distance transform
        # of the volume, which takes many times the memory.
        surface = np.argwhere(is_organ & ~ndimage.binary_erosion(is_organ))
        _, nearest = KDTree(surface * spacing).query(np.argwhere(is_tumor) * spacing)
        healthy[is_tumor] = healthy[tuple(surface[nearest].T)]
    return healthy
