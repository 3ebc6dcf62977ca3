"""What MAISI knows of anatomy: labels, regions, tumors, and the outline of the body."""

from .augmentation import MovedTumor, augment
from .bits import label_bits
from .body import add_body_label
from .clean_up import CleanUpReport, clean_up
from .colours import label_colours, legend_names
from .crumbs import remove_crumbs
from .label_map import load_label_map
from .mask_database import FoundMask, MaisiMaskDatabase
from .mask_entry import MaskEntry
from .quality_check import QUALITY_THRESHOLDS, check_quality, describe_outliers
from .regions import REGION_WORDS, REGIONS, one_hot, region_of_word, regions_from_labels, regions_from_words
from .size_conditions import check_sizes, complete_anatomy_size, read_size_conditions
from .sizes import anatomy_sizes, size_of_volume, volume_of_size
from .totalsegmentator import TOTALSEGMENTATOR_CLASSES, TOTALSEGMENTATOR_TO_MAISI, totalsegmentator_to_maisi
from .tumor_size import fit_tumor
from .tumors import remove_tumors
from .vocabulary import (
    BODY,
    BONES,
    CONTROLLABLE_ANATOMY,
    DUMMIES,
    LABELS,
    LUNG_LOBES,
    MASK_VAE_LABELS,
    TUMORS,
    label_index,
    label_name,
    labels_present,
    new_vocabulary,
)

__all__ = [
    "BODY",
    "BONES",
    "CONTROLLABLE_ANATOMY",
    "CleanUpReport",
    "DUMMIES",
    "FoundMask",
    "LABELS",
    "LUNG_LOBES",
    "MASK_VAE_LABELS",
    "MaisiMaskDatabase",
    "MaskEntry",
    "MovedTumor",
    "QUALITY_THRESHOLDS",
    "REGION_WORDS",
    "REGIONS",
    "TOTALSEGMENTATOR_CLASSES",
    "TOTALSEGMENTATOR_TO_MAISI",
    "TUMORS",
    "add_body_label",
    "anatomy_sizes",
    "augment",
    "check_quality",
    "check_sizes",
    "clean_up",
    "complete_anatomy_size",
    "describe_outliers",
    "fit_tumor",
    "label_bits",
    "label_colours",
    "label_index",
    "label_name",
    "labels_present",
    "legend_names",
    "load_label_map",
    "new_vocabulary",
    "one_hot",
    "read_size_conditions",
    "region_of_word",
    "regions_from_labels",
    "regions_from_words",
    "remove_crumbs",
    "remove_tumors",
    "size_of_volume",
    "totalsegmentator_to_maisi",
    "volume_of_size",
]
