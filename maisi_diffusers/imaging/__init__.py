"""NIfTI in and out, grids and orientation, intensities."""

from .intensity import background_value, from_hu, to_hu
from .modality import MODALITIES, is_ct, modality_code, modality_names
from .nifti import ct_to_nifti, labels_to_nifti, load_volume
from .preview import WINDOWS, save_preview
from .resample import (
    resample_like,
    resample_to_grid,
    spacing_affine,
    spacing_of,
    to_ras,
)

__all__ = [
    "MODALITIES",
    "WINDOWS",
    "background_value",
    "ct_to_nifti",
    "from_hu",
    "is_ct",
    "labels_to_nifti",
    "load_volume",
    "modality_code",
    "modality_names",
    "resample_like",
    "resample_to_grid",
    "save_preview",
    "spacing_affine",
    "spacing_of",
    "to_hu",
    "to_ras",
]
