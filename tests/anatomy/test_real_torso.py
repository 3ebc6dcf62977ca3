"""A real label map, brought onto the model's grid from the orientations and slice thicknesses it may be saved in."""

import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers.anatomy import add_body_label, label_index, labels_present, load_label_map
from maisi_diffusers.imaging import (
    load_volume,
    resample_like,
    resample_to_grid,
    spacing_of,
    to_ras,
)

FIVE_ML = 5000.0


@pytest.fixture(scope="module")
def torso(torso_ct, torso_labels) -> nib.Nifti1Image:
    return add_body_label(load_label_map(torso_labels, "totalsegmentator"), load_volume(torso_ct))


def on_model_grid(image: nib.Nifti1Image) -> nib.Nifti1Image:
    image = to_ras(image)
    spacing = tuple(n * mm / 128 for n, mm in zip(image.shape, spacing_of(image)))
    return resample_to_grid(image, (128, 128, 128), spacing, order=0, fill=0)


def dice(expected: nib.Nifti1Image, found: nib.Nifti1Image, larger_than: float = FIVE_ML) -> dict[int, float]:
    """Dice of every organ larger than this many mm3."""
    expected_labels, found_labels = np.asanyarray(expected.dataobj), np.asanyarray(found.dataobj)
    scores = {}
    for label in labels_present(expected_labels):
        a, b = expected_labels == label, found_labels == label
        if a.sum() * np.prod(spacing_of(expected)) > larger_than:
            scores[label] = 2 * (a & b).sum() / (a.sum() + b.sum())
    return scores


def in_lps(image: nib.Nifti1Image) -> nib.Nifti1Image:
    return image.as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))


def rotated(image: nib.Nifti1Image) -> nib.Nifti1Image:
    z, x = np.radians([12, 7])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    return nib.Nifti1Image(np.asanyarray(image.dataobj), nib.affines.from_matvec(about_z @ about_x) @ image.affine)


def in_4_mm_slices(image: nib.Nifti1Image) -> nib.Nifti1Image:
    size = (*image.shape[:2], round(image.shape[2] * 3 / 4))
    return resample_to_grid(image, size, (3.0, 3.0, 4.0), order=0, fill=0)


def test_every_class_survives(torso, torso_labels):
    raw = np.unique(np.asanyarray(nib.load(torso_labels).dataobj))
    assert len(raw) == 62  # background and 61 classes
    out = on_model_grid(torso)
    assert out.shape == (128, 128, 128)
    assert spacing_of(out) == pytest.approx((2.859375, 2.3671875, 2.625))
    assert len(labels_present(np.asanyarray(out.dataobj))) == 62  # 61 classes and body
    assert labels_present(np.asanyarray(out.dataobj)) == labels_present(np.asanyarray(torso.dataobj))


def test_sides_and_ends_are_the_patients(torso):
    """World x grows to the right, y to the front, z upwards: a swap or a flip shows."""
    out = on_model_grid(torso)
    data = np.asanyarray(out.dataobj)

    def centroid(name):
        return nib.affines.apply_affine(out.affine, np.argwhere(data == label_index(name)).mean(0))

    for pair in ("kidney", "hip", "femur", "iliopsoas", "gluteus maximus", "autochthon"):
        assert centroid(f"left {pair}")[0] < centroid(f"right {pair}")[0]
    assert centroid("liver")[0] > centroid("spleen")[0]
    assert centroid("vertebrae L1")[2] > centroid("vertebrae L5")[2] > centroid("bladder")[2]
    assert centroid("bladder")[1] > centroid("sacrum")[1]
    raw = np.asanyarray(torso.dataobj)
    shifts = [
        nib.affines.apply_affine(out.affine, np.argwhere(data == label).mean(0))
        - nib.affines.apply_affine(torso.affine, np.argwhere(raw == label).mean(0))
        for label in dice(out, out)
    ]
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.1, "half a voxel would be more than 1.1 mm"


def test_lps_is_the_same(torso):
    expected, found = on_model_grid(torso), on_model_grid(in_lps(torso))
    assert np.allclose(found.affine, expected.affine)
    assert (np.asanyarray(found.dataobj) == np.asanyarray(expected.dataobj)).all()


def test_rotated_affine_is_the_same_voxels(torso):
    expected, found = on_model_grid(torso), on_model_grid(rotated(torso))
    assert np.allclose(found.affine, rotated(expected).affine)
    assert (np.asanyarray(found.dataobj) == np.asanyarray(expected.dataobj)).all()


def test_4_mm_slices_agree_as_far_as_they_can(torso):
    """Every fourth slice of 3 mm is lost, which costs thin organs more than 0.05 whatever the interpolation."""
    expected = on_model_grid(torso)
    found = resample_like(in_4_mm_slices(torso), expected, order=0, fill=0)
    scores = dice(expected, found)
    assert len(scores) >= 50
    assert np.mean(list(scores.values())) > 0.95
    assert min(scores.values()) > 0.86
    assert min(dice(expected, found, larger_than=70_000).values()) > 0.95


@pytest.mark.parametrize("saved", [in_lps, rotated, in_4_mm_slices])
def test_users_grid_comes_back(torso, saved):
    """From the user's grid to the model's and back."""
    image = saved(torso)
    back = resample_like(on_model_grid(image), image, order=0, fill=0)
    assert np.allclose(back.affine, image.affine)
    assert min(dice(image, back).values()) > 0.85
    fine_spacing = tuple(n * mm / 256 for n, mm in zip(image.shape, spacing_of(image)))
    finer = resample_to_grid(image, (256, 256, 256), fine_spacing, order=0, fill=0)
    assert min(dice(image, resample_like(finer, image, order=0, fill=0)).values()) == 1
