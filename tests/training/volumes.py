"""Small volumes, label maps and latents on disk."""

from pathlib import Path

import nibabel as nib
import numpy as np

from tests.tiny import SIZE, SPACING, make_label_map

AFFINE = np.diag([*SPACING, 1.0])
AFFINE[:3, 3] = (-20.0, 7.5, 100.0)
TISSUE, LUNG, AIR = 40, -700, -1000


def label_array() -> np.ndarray:
    """Labels (24, 16, 32) with the body: liver, hepatic tumor, left lung, left femur."""
    return np.asarray(make_label_map().dataobj)


def ct_array() -> np.ndarray:
    """The CT of these labels in HU."""
    labels = label_array()
    return np.select([labels == 0, labels == 28], [AIR, LUNG], TISSUE).astype(np.int16)


def without_body() -> np.ndarray:
    """These labels as a segmentation of organs has them."""
    labels = label_array()
    return np.where(labels == 200, 0, labels).astype(np.uint8)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def save_latent(path: Path, channels: int = 4, affine: np.ndarray | None = None) -> Path:
    """A latent of the CT, with the affine of its own voxels if none is given."""
    shape = tuple(n // 4 for n in SIZE)
    if affine is None:
        affine = AFFINE @ nib.affines.from_matvec(np.diag([4.0, 4.0, 4.0]), [1.5, 1.5, 1.5])
    return save(path, np.random.default_rng(0).normal(size=(*shape, channels)).astype(np.float32), affine)


def in_lps(path: Path) -> Path:
    """Save a file again with its first two axes the other way round."""
    image = nib.load(path)
    nib.save(image.as_reoriented(np.array([[0, -1], [1, -1], [2, 1]])), path)
    return path
