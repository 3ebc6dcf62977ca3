import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers.anatomy import load_label_map
from tests.imaging.test_nifti import AFFINE, LABELS, image, values


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.int64])
def test_label_map_is_uint8(tmp_path, dtype):
    labels = LABELS.astype(dtype)
    labels[-1, -1, -1] = 200
    nib.save(image(labels, dtype=dtype), tmp_path / "a.nii.gz")
    loaded = load_label_map(tmp_path / "a.nii.gz")
    assert values(loaded).dtype == np.uint8 and loaded.get_data_dtype() == np.uint8
    assert (values(loaded) == labels).all()
    assert (loaded.affine == AFFINE).all()


def test_label_map_with_a_scale_of_one_is_integer(tmp_path):
    nib.save(image(LABELS, slope=1), tmp_path / "a.nii")
    assert (values(load_label_map(tmp_path / "a.nii")) == LABELS).all()


def test_totalsegmentator_labels_are_translated():
    loaded = load_label_map(image(np.array([[[0, 2, 3, 117]]], np.uint8)), "totalsegmentator")
    assert values(loaded).tolist() == [[[0, 5, 14, 114]]]


def one(label, dtype=np.int16):
    return np.array([[[0, label]]], dtype)


@pytest.mark.parametrize(
    ("labels", "vocabulary", "message"),
    [
        (one(1, np.float32), "maisi", "floating-point.*np.uint8"),
        (one(-1), "maisi", r"\[-1\].*0..255"),
        (one(300), "maisi", r"\[300\].*0..255"),
        (np.arange(256, 280, dtype=np.int16).reshape(2, 3, 4), "maisi", r"\[256, .*263\] and 16 more"),
        (one(133), "maisi", r"\[133\].*1 to 132"),
        (np.array([[[1, 199, 201, 255]]], np.uint8), "maisi", r"\[199, 201, 255\]"),
        (one(118), "totalsegmentator", r"\[118\].*117"),
        (one(200), "totalsegmentator", r"\[200\].*117"),
        (one(0), "maisi", "no label"),
        (one(1), "synthseg", "'synthseg'.*'maisi' or 'totalsegmentator'"),
    ],
)
def test_bad_label_maps_are_refused(labels, vocabulary, message):
    with pytest.raises(ValueError, match=message) as error:
        load_label_map(image(labels), vocabulary)
    assert "\n" not in str(error.value)


def test_scaled_label_map_is_refused(tmp_path):
    nib.save(image(LABELS, slope=0.5), tmp_path / "a.nii")
    with pytest.raises(ValueError, match="floating-point"):
        load_label_map(tmp_path / "a.nii")
