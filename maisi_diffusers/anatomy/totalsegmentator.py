"""Label maps of TotalSegmentator, translated to MAISI's vocabulary.

The class list is that of task `total` in TotalSegmentator v2 (Wasserthal et al., Radiology: Artificial Intelligence
2023). v1 numbered 104 classes differently; a v1 label map cannot be told apart by its numbers.
"""

import numpy as np

from .vocabulary import LABELS, labels_present


def _sides(*names: str) -> list[str]:
    return [f"{name}_{side}" for name in names for side in ("left", "right")]


TOTALSEGMENTATOR_CLASSES: tuple[str, ...] = (
    *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas"),
    *("adrenal_gland_right", "adrenal_gland_left", "lung_upper_lobe_left", "lung_lower_lobe_left"),
    *("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right", "esophagus", "trachea"),
    *("thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate"),
    *(*_sides("kidney_cyst"), "sacrum", "vertebrae_S1"),
    *(f"vertebrae_L{i}" for i in range(5, 0, -1)),
    *(f"vertebrae_T{i}" for i in range(12, 0, -1)),
    *(f"vertebrae_C{i}" for i in range(7, 0, -1)),
    *("heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk"),
    *("subclavian_artery_right", "subclavian_artery_left"),
    *("common_carotid_artery_right", "common_carotid_artery_left"),
    *(*_sides("brachiocephalic_vein"), "atrial_appendage_left", "superior_vena_cava", "inferior_vena_cava"),
    *("portal_vein_and_splenic_vein", *_sides("iliac_artery", "iliac_vena")),
    *_sides("humerus", "scapula", "clavicula", "femur", "hip"),
    *("spinal_cord", *_sides("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas")),
    *("brain", "skull"),
    *(f"rib_left_{i}" for i in range(1, 13)),
    *(f"rib_right_{i}" for i in range(1, 13)),
    *("sternum", "costal_cartilages"),
)
"""The 117 classes in order: label 1 is the first."""


def maisi_name(totalsegmentator_class: str) -> str:
    """Name of a TotalSegmentator class in MAISI's vocabulary, where the side comes first: "left rib 1"."""
    if totalsegmentator_class == "urinary_bladder":
        return "bladder"
    words = totalsegmentator_class.split("_")
    side = [word for word in words if word in ("left", "right")]
    return " ".join(side + [word for word in words if word not in side])


TOTALSEGMENTATOR_TO_MAISI: np.ndarray = np.array(
    [0] + [LABELS[maisi_name(name)] for name in TOTALSEGMENTATOR_CLASSES], dtype=np.uint8
)
"""Lookup table (118,) uint8: label of TotalSegmentator v2 `total` -> label of MAISI; one to one."""


def totalsegmentator_to_maisi(labels: np.ndarray) -> np.ndarray:
    """Translate a uint8 label map from TotalSegmentator v2 `total` to MAISI's vocabulary.

    Raises:
        ValueError: if it holds a label above 117, naming it.
    """
    unknown = [label for label in labels_present(labels) if label >= len(TOTALSEGMENTATOR_TO_MAISI)]
    if unknown:
        raise ValueError(
            f"Labels {unknown} are not in TotalSegmentator v2's task `total`, which ends at 117; "
            'pass vocabulary="maisi" if the label map is already in MAISI\'s vocabulary.'
        )
    return TOTALSEGMENTATOR_TO_MAISI[labels]
