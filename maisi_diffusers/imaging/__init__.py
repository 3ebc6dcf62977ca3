"""NIfTI in and out, grids and orientation, intensities."""

from .intensity import background_value, from_hu, to_hu
from .nifti import ct_to_nifti, labels_to_nifti, load_label_map, load_volume
from .preview import save_preview
from .resample import (
    resample_like,
    resample_to_grid,
    spacing_affine,
    spacing_of,
    to_ras,
)

__all__ = [
    "background_value",
    "ct_to_nifti",
    "from_hu",
    "labels_to_nifti",
    "load_label_map",
    "load_volume",
    "resample_like",
    "resample_to_grid",
    "save_preview",
    "spacing_affine",
    "spacing_of",
    "to_hu",
    "to_ras",
]
