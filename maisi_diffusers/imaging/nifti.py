"""NIfTI files in and out, checked where they enter.

Images stay `nibabel.Nifti1Image` from end to end, so that voxels never travel without their affine.
"""

import zlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

SCANNER_ANATOMICAL = 1  # NIFTI_XFORM_SCANNER_ANAT
DESCRIPTION = "synthetic: maisi-diffusers"

# What nibabel lets through when a file's bytes are not what its name or its header promises.
UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)


def load_volume(source: str | PathLike | nib.Nifti1Image) -> nib.Nifti1Image:
    """Read a three-dimensional NIfTI volume.

    Args:
        source: path of a .nii or .nii.gz file, or an image.

    Returns:
        The image (X, Y, Z) with its affine and orientation as they are and its data in memory: integers keep their
        type, anything scaled or floating comes as float32. Trailing axes of length 1 are dropped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, damaged or no NIfTI; if it is not three-dimensional or holds no voxel; if its
            values are not real numbers or not finite; if its affine is not finite or not invertible.
    """
    if isinstance(source, nib.Nifti1Image):
        name, image = "The image", source
    else:
        name, image = f"{str(source)!r}", _open(source)
    try:
        data = np.asanyarray(image.dataobj)
    except (*UNREADABLE, MemoryError) as error:  # a damaged header may promise more than fits in memory
        reason = _line(error) or "larger than memory"
        raise ValueError(f"{name} is damaged or cut short ({reason}); copy or export it again.") from error

    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise ValueError(f"{name} has shape {data.shape}, must be one volume (X, Y, Z); save one of its volumes.")
    if 0 in data.shape:
        raise ValueError(f"{name} has shape {data.shape}, every axis must have at least one voxel; export it again.")
    if data.dtype.kind not in "uif":
        raise ValueError(f"{name} has data type {data.dtype}, must be real numbers; convert it to grey values.")
    if data.dtype.kind == "f":
        data = data.astype(np.float32, copy=False)
        if not np.isfinite(data).all():
            raise ValueError(f"{name} has NaN or infinite voxels; replace them, in a CT with -1000 HU.")

    affine = image.affine
    if affine is None or not np.isfinite(affine).all():
        given = np.asarray(affine).tolist()
        raise ValueError(f"{name} has no finite affine ({given}); set its sform to a voxel-to-mm affine.")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise ValueError(f"{name} has a singular affine {affine[:3].tolist()}; set its sform to a voxel-to-mm affine.")

    header = image.header.copy()
    header.set_data_dtype(data.dtype)
    return type(image)(data, affine, header)


def is_up_to_date(path: Path, description: str, sources: Iterable[Path]) -> bool:
    """Whether a NIfTI file is there, its header has a description, and it is no older than what it was made of."""
    try:
        header = nib.load(path).header
    except UNREADABLE:  # a missing file's error is among them
        return False
    made = path.stat().st_mtime
    told = header["descrip"].item().decode(errors="replace")
    return told == description and all(source.stat().st_mtime <= made for source in sources)


def ct_to_nifti(hu: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """Synthetic image (X, Y, Z) in HU, or in MR units, to int16: rounded, and clipped to what int16 holds."""
    limits = np.iinfo(np.int16)
    return _synthetic(np.rint(hu).clip(limits.min, limits.max).astype(np.int16), affine)


def labels_to_nifti(labels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """Label map (X, Y, Z) of integers 0..255, synthetic or prepared for synthesis, to uint8."""
    return _synthetic(labels.astype(np.uint8), affine)


def _synthetic(data: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(data, affine)
    # Both forms, for there are readers of either. A qform cannot shear; where the affine does, the sform is right.
    image.set_sform(affine, code=SCANNER_ANATOMICAL)
    image.set_qform(affine, code=SCANNER_ANATOMICAL)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = DESCRIPTION
    return image


def _open(source: str | PathLike) -> nib.Nifti1Image:
    if not isinstance(source, (str, PathLike)):
        raise ValueError(
            f"A {type(source).__name__} is neither a path nor a NIfTI image; wrap an array as "
            "nib.Nifti1Image(array, affine)."
        )
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}; pass the path of a .nii or .nii.gz file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty (0 bytes), must be a NIfTI file; copy or export it again.")
    try:
        image = nib.load(path)
    except UNREADABLE as error:
        raise ValueError(f"{str(path)!r} cannot be read as NIfTI ({_line(error)}); export it as .nii.gz.") from error
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"{str(path)!r} is {type(image).__name__}, must be a NIfTI file; export it as .nii.gz.")
    return image


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
