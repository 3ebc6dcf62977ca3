import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from maisi_diffusers.imaging import (
    resample_like,
    resample_to_grid,
    spacing_affine,
    spacing_of,
    to_ras,
)


def rotation(z_degrees: float, x_degrees: float) -> np.ndarray:
    z, x = np.radians([z_degrees, x_degrees])
    about_z = np.array([[np.cos(z), -np.sin(z), 0, 0], [np.sin(z), np.cos(z), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    about_x = np.array([[1, 0, 0, 0], [0, np.cos(x), -np.sin(x), 0], [0, np.sin(x), np.cos(x), 0], [0, 0, 0, 1]])
    return about_z @ about_x


STRAIGHT = np.array([[1.5, 0, 0, -7.0], [0, 2.0, 0, 11.0], [0, 0, 2.5, 3.0], [0, 0, 0, 1]])
OBLIQUE = rotation(12, 7) @ STRAIGHT
ORIENTATIONS = [
    np.array([*zip(axes, flips)])
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def world(image: nib.Nifti1Image) -> np.ndarray:
    return apply_affine(image.affine, np.moveaxis(np.indices(image.shape), 0, -1))


def centre(image: nib.Nifti1Image) -> np.ndarray:
    return apply_affine(image.affine, (np.array(image.shape) - 1) / 2)


def values(image: nib.Nifti1Image) -> np.ndarray:
    return np.asanyarray(image.dataobj)


def labels(shape=(7, 6, 5), affine=STRAIGHT) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.random.default_rng(0).integers(1, 133, shape).astype(np.uint8), affine)


def nearest_by_search(source: nib.Nifti1Image, target: nib.Nifti1Image, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Label of the nearest voxel in the source's own coordinates, and where no two are equally near."""
    index = apply_affine(np.linalg.inv(source.affine) @ target.affine, np.moveaxis(np.indices(target.shape), 0, -1))
    clear = (np.abs(index - np.floor(index) - 0.5) > 1e-4).all(-1)
    nearest = np.rint(index).astype(int)
    inside = ((nearest >= 0) & (nearest < source.shape)).all(-1)
    found = np.full(target.shape, fill, values(source).dtype)
    found[inside] = values(source)[tuple(nearest[inside].T)]
    return found, clear


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_to_ras_keeps_every_voxel_where_it_is(affine, orientation):
    ras = labels(affine=affine)
    turned = ras.as_reoriented(orientation)
    back = to_ras(turned)
    assert nib.aff2axcodes(back.affine) == ("R", "A", "S")
    assert np.allclose(back.affine, affine)
    assert (values(back) == values(ras)).all()


def test_spacing():
    assert spacing_of(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), OBLIQUE)) == pytest.approx((1.5, 2.0, 2.5))
    assert spacing_of(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), spacing_affine((0.7, 0.8, 5)))) == pytest.approx(
        (0.7, 0.8, 5)
    )


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("size", "spacing"), [((14, 3, 9), (0.75, 4.0, 1.1)), ((4, 10, 5), (2.0, 2.0, 2.0))])
def test_grid_keeps_centre_and_directions(affine, order, size, spacing):
    image = labels(affine=affine)
    out = resample_to_grid(image, size, spacing, order, fill=0)
    assert out.shape == size
    assert spacing_of(out) == pytest.approx(spacing)
    assert np.abs(centre(out) - centre(image)).max() < 1e-9
    assert np.allclose(out.affine[:3, :3] / spacing, image.affine[:3, :3] / spacing_of(image))
    assert values(out).dtype == (np.uint8 if order == 0 else np.float32)


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE])
@pytest.mark.parametrize(("factor", "margin"), [(2.0, 0), (1.4, 1), (0.5, 1)])
def test_linear_is_exact_on_a_ramp(affine, factor, margin):
    """A half-voxel shift anywhere would move the ramp by half a voxel."""
    image = labels((20, 16, 12), affine)
    slope = np.array([0.5, -1.0, 2.0])
    image = nib.Nifti1Image(world(image) @ slope, affine)
    size = tuple(int(n / factor) for n in image.shape)
    out = resample_to_grid(image, size, tuple(factor * mm for mm in spacing_of(image)), order=1, fill=-1000)
    inner = (slice(margin, -margin or None),) * 3
    assert np.abs(values(out) - world(out) @ slope)[inner].max() < 1e-4


def test_halving_keeps_the_centroid():
    data = np.zeros((16, 12, 8), np.uint8)
    data[4:12, 2:6, 0:4] = 1
    image = nib.Nifti1Image(data, OBLIQUE)
    halved = resample_to_grid(image, (8, 6, 4), tuple(2 * mm for mm in spacing_of(image)), order=0, fill=0)
    doubled = resample_to_grid(image, (32, 24, 16), tuple(mm / 2 for mm in spacing_of(image)), order=0, fill=0)
    before = world(image)[data > 0].mean(0)
    for after in (halved, doubled):
        assert np.abs(world(after)[values(after) > 0].mean(0) - before).max() < 1e-6


def test_doubling_repeats_every_label():
    image = labels()
    out = resample_to_grid(image, (14, 12, 10), (0.75, 1.0, 1.25), order=0, fill=0)
    assert (values(out) == values(image).repeat(2, 0).repeat(2, 1).repeat(2, 2)).all()


@pytest.mark.parametrize("order", [0, 1])
def test_same_grid_is_the_same_image(order):
    image = labels()
    assert (values(resample_to_grid(image, image.shape, spacing_of(image), order, fill=0)) == values(image)).all()
    assert (values(resample_like(image, image, order, fill=0)) == values(image)).all()


@pytest.mark.parametrize(("order", "fill"), [(0, 7), (1, -1000)])
def test_larger_field_of_view_is_padded_and_smaller_cropped(order, fill):
    image = labels((4, 6, 5))
    out = values(resample_to_grid(image, (8, 2, 5), spacing_of(image), order, fill))
    assert (out[[0, 1, -2, -1]] == fill).all()
    assert (out[2:-2] == values(image)[:, 2:4]).all()


@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE])
def test_field_of_view_reaches_half_a_voxel_beyond_the_outer_centres(affine):
    image = nib.Nifti1Image(np.full((4, 4, 4), 60, np.int16), affine)
    fine = resample_to_grid(image, (40, 40, 40), tuple(mm / 8 for mm in spacing_of(image)), order=1, fill=-1000)
    assert (values(fine)[4:-4, 4:-4, 4:-4] == 60).all()
    outside = values(fine).copy()
    outside[4:-4, 4:-4, 4:-4] = -1000
    assert (outside == -1000).all()
    # The same through the path for rotated grids.
    fine = affine @ rotation(1e-2, 1e-2) @ np.diag([0.2, 0.2, 0.2, 1])
    turned = nib.Nifti1Image(np.zeros((40, 40, 40), np.uint8), fine)
    index = apply_affine(np.linalg.inv(affine) @ turned.affine, np.moveaxis(np.indices(turned.shape), 0, -1))
    inside = ((index > -0.5) & (index < 3.5)).all(-1)
    assert (values(resample_like(image, turned, order=1, fill=-1000)) == np.where(inside, 60, -1000)).all()


def around(shape, linear) -> nib.Nifti1Image:
    """Empty grid about (nearly) the middle of `labels()`, with the voxel axes in `linear`."""
    middle = centre(labels()) + (0.07, -0.11, 0.13)  # off by a little, so that hardly any two voxels are equally near
    affine = nib.affines.from_matvec(linear, middle - linear @ ((np.array(shape) - 1) / 2))
    return nib.Nifti1Image(np.zeros(shape, np.uint8), affine)


TARGETS = {
    "shifted and scaled": around((9, 8, 6), np.diag([1.21, 2.27, 2.31])),
    "flipped and swapped": around((6, 7, 8), np.array([[0, -1.1, 0], [0, 0, 1.7], [-2.1, 0, 0]])),
    "rotated": around((9, 10, 8), (rotation(-20, 30) @ np.diag([1.3, 1.6, 1.7, 1]))[:3, :3]),
    "sheared": around((8, 8, 8), np.array([[1.5, 0.3, 0], [0, 1.9, 0.2], [0, 0, 1.7]])),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("source_affine", [STRAIGHT, OBLIQUE])
@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_like_takes_the_nearest_voxel_in_the_world(target, source_affine, orientation):
    source = labels(affine=source_affine).as_reoriented(orientation)
    out = resample_like(source, target, order=0, fill=0)
    expected, clear = nearest_by_search(source, target, fill=0)
    assert clear.mean() > 0.9 and (expected > 0).mean() > 0.1
    assert (values(out) == expected)[clear].all()
    assert (out.affine == target.affine).all() and values(out).dtype == np.uint8


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_like_is_exact_on_a_ramp(target):
    slope = np.array([0.5, -1.0, 2.0])
    ramp = nib.Nifti1Image(world(labels((12, 11, 10))) @ slope, STRAIGHT)
    out = resample_like(ramp, target, order=1, fill=-1000)
    index = apply_affine(np.linalg.inv(STRAIGHT) @ target.affine, np.moveaxis(np.indices(target.shape), 0, -1))
    inner = ((index >= 0) & (index <= np.array(ramp.shape) - 1)).all(-1)
    assert inner.any()
    assert np.abs(values(out) - world(out) @ slope)[inner].max() < 1e-4


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("affine", [STRAIGHT, OBLIQUE])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_result_does_not_depend_on_the_orientation_saved(order, affine, orientation):
    """Not even where two voxels are equally near, as in halving."""
    ras = labels((8, 6, 4), affine)
    target = resample_to_grid(ras, (4, 3, 2), (3.0, 4.0, 5.0), order, fill=0)
    turned = resample_like(ras.as_reoriented(orientation), target, order, fill=0)
    assert np.allclose(values(turned), values(target), atol=1e-3 * order)


def test_there_and_back_through_a_finer_grid():
    image = labels((7, 6, 5), OBLIQUE)
    fine_spacing = tuple(n * mm / 16 for n, mm in zip(image.shape, spacing_of(image)))
    finer = resample_to_grid(image, (16, 16, 16), fine_spacing, order=0, fill=0)
    assert (values(resample_like(finer, image, order=0, fill=0)) == values(image)).all()


def test_other_orders_are_refused():
    with pytest.raises(ValueError, match="order is 3.*0 .nearest.*1 .linear"):
        resample_to_grid(labels(), (2, 2, 2), (1, 1, 1), order=3, fill=0)
