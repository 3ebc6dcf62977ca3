"""Orientation, voxel size and grid of a NIfTI image: every function takes an image and returns one.

A voxel is a box around its centre, so a volume of `n` voxels reaches from index -0.5 to n - 0.5 along an axis. That is
the field of view: sampling inside it reads the volume, sampling outside it gives the fill value.
"""

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation, ornt_transform
from scipy import ndimage

# Indices that should be whole or half numbers come out of matrix products a few 1e-12 off. Without slack, which of two
# equally near voxels is taken would change from slice to slice.
INDEX_TOLERANCE = 1e-6


def spacing_of(image: nib.Nifti1Image) -> tuple[float, float, float]:
    """Voxel size in mm along each array axis: the column norms of the affine."""
    return tuple(float(size) for size in nib.affines.voxel_sizes(image.affine))


def spacing_affine(spacing: tuple[float, float, float]) -> np.ndarray:
    """RAS+ affine (4, 4) of a volume with this voxel size in mm and its first voxel at the world's origin."""
    return np.diag([*spacing, 1.0])


def to_ras(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Flip and swap axes until they point as near as they can to right, anterior, superior (RAS+).

    Voxels are moved, never interpolated. A rotation that is left over (an oblique scan) stays in the affine.
    """
    return nib.as_closest_canonical(image)


def resample_to_grid(
    image: nib.Nifti1Image,
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    order: int,
    fill: float,
) -> nib.Nifti1Image:
    """Resample to a size and voxel size, around the same centre and along the same axis directions.

    Args:
        image: volume (X, Y, Z); bring it to RAS+ first (`to_ras`) if `size` and `spacing` are meant in RAS+.
        size: voxels along each axis of the result. Too large a field of view is padded, too small a one crops.
        spacing: mm along each axis of the result.
        order: 0 takes the nearest voxel and keeps the data type (labels), 1 interpolates linearly in float32 (CT, MR).
        fill: value outside the image's field of view: 0 for labels, -1000 for CT.

    Raises:
        ValueError: for any other `order`.
    """
    size = np.asarray(size)
    affine = np.eye(4)
    affine[:3, :3] = image.affine[:3, :3] / spacing_of(image) * spacing
    centre = nib.affines.apply_affine(image.affine, (np.array(image.shape) - 1) / 2)
    affine[:3, 3] = centre - affine[:3, :3] @ ((size - 1) / 2)
    return _resample(image, tuple(int(n) for n in size), affine, order, fill)


def resample_like(image: nib.Nifti1Image, reference: nib.Nifti1Image, order: int, fill: float) -> nib.Nifti1Image:
    """Resample onto the grid of `reference`, voxel centre by voxel centre through world coordinates.

    The two may differ in orientation, rotation, voxel size and field of view. `order`, `fill` and the errors are those
    of [`resample_to_grid`].
    """
    return _resample(image, reference.shape[:3], reference.affine, order, fill)


def _resample(
    image: nib.Nifti1Image, shape: tuple[int, int, int], affine: np.ndarray, order: int, fill: float
) -> nib.Nifti1Image:
    if order not in (0, 1):
        raise ValueError(f"order is {order!r}, must be 0 (nearest, for labels) or 1 (linear, for intensities).")

    # With both sets of axes pointing the same way, equally near voxels are told apart by the target's axes, so that
    # the result does not depend on the orientation the source was saved in.
    image = image.as_reoriented(ornt_transform(io_orientation(image.affine), io_orientation(affine)))
    data = np.asanyarray(image.dataobj)
    if order == 1:
        data = data.astype(np.float32, copy=False)

    target_to_source = np.linalg.inv(image.affine) @ affine
    linear, offset = target_to_source[:3, :3], target_to_source[:3, 3]
    scales = np.diag(linear)
    shear = np.abs(linear - np.diag(scales)) @ shape  # voxels of the source, at the far corner of the target
    if (shear < 1e-3).all():
        for axis in range(3):
            data = _sample_axis(data, axis, scales[axis] * np.arange(shape[axis]) + offset[axis], order, fill)
    else:
        data = _sample_affine(data, linear, offset, shape, order, fill)
    return nib.Nifti1Image(data, affine)


def _sample_axis(data: np.ndarray, axis: int, index: np.ndarray, order: int, fill: float) -> np.ndarray:
    last = data.shape[axis] - 1
    outside = _outside(index, last + 1)
    if order == 0:
        nearest = np.floor(index + 0.5 + INDEX_TOLERANCE).astype(np.intp)
        sampled = np.take(data, nearest.clip(0, last), axis)
    else:
        index = index.clip(0, last)
        below = np.floor(index).astype(np.intp)
        weight = (index - below).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        sampled = np.take(data, below, axis)
        sampled += weight * (np.take(data, (below + 1).clip(0, last), axis) - sampled)
    sampled[(slice(None),) * axis + (outside,)] = fill
    return sampled


def _sample_affine(
    data: np.ndarray, linear: np.ndarray, offset: np.ndarray, shape: tuple[int, int, int], order: int, fill: float
) -> np.ndarray:
    # scipy's own fill starts at the outermost voxel centres and would cut half a voxel off the field of view.
    nudge = INDEX_TOLERANCE if order == 0 else 0.0
    sampled = ndimage.affine_transform(
        data, linear, offset + nudge, shape, order=order, mode="nearest", prefilter=False
    )
    y, z = np.ogrid[: shape[1], : shape[2]]
    for x, plane in enumerate(sampled):
        for axis in range(3):
            index = linear[axis] @ [x, 0, 0] + offset[axis] + linear[axis, 1] * y + linear[axis, 2] * z
            plane[_outside(index, data.shape[axis])] = fill
    return sampled


def _outside(index: np.ndarray, n: int) -> np.ndarray:
    return (index < -0.5 - INDEX_TOLERANCE) | (index > n - 0.5 + INDEX_TOLERANCE)
