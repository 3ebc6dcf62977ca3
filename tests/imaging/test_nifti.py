import gzip

import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers.anatomy import load_label_map
from maisi_diffusers.imaging import ct_to_nifti, labels_to_nifti, load_volume

AFFINE = np.array([[0.0, -2.0, 0.0, 10.0], [1.5, 0.0, 0.0, -20.0], [0.0, 0.0, 3.0, 30.0], [0.0, 0.0, 0.0, 1.0]])
LABELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def image(data, affine=AFFINE, dtype=None, slope=None):
    made = nib.Nifti1Image(data, affine, dtype=dtype)
    if slope is not None:
        made.header.set_slope_inter(slope, 0)
    return made


def values(loaded):
    return np.asanyarray(loaded.dataobj)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("as_path", [str, lambda path: path, nib.load])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_volume_keeps_data_and_affine(tmp_path, name, as_path, kind):
    data = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
    nib.save(kind(data, AFFINE), tmp_path / name)
    loaded = load_volume(as_path(tmp_path / name))
    assert values(loaded).dtype == np.int16
    assert (values(loaded) == data).all()
    assert (loaded.affine == AFFINE).all()


def test_scaled_volume_is_float32(tmp_path):
    scaled = image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), slope=0.5)
    nib.save(scaled, tmp_path / "a.nii")
    raw = nib.load(tmp_path / "a.nii")
    loaded = load_volume(tmp_path / "a.nii")
    assert values(loaded).dtype == np.float32
    assert np.allclose(values(loaded), raw.get_fdata())
    nib.save(loaded, tmp_path / "b.nii")
    assert np.allclose(nib.load(tmp_path / "b.nii").get_fdata(), raw.get_fdata()), "the header must say float32 too"


@pytest.mark.parametrize("shape", [(2, 3, 4, 1), (2, 3, 4, 1, 1)])
def test_trailing_axes_of_one_are_dropped(shape):
    assert (values(load_volume(image(LABELS.reshape(shape)))) == LABELS).all()


def test_single_slice_is_a_volume():
    assert load_volume(image(LABELS[:, :, :1])).shape == (2, 3, 1)


NAN = np.where(np.eye(4) == 1, np.nan, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: image(np.zeros((2, 3, 4, 5), np.int16)), r"shape \(2, 3, 4, 5\)"),
        (lambda: image(np.zeros((2, 3, 4, 1, 3), np.int16)), r"shape \(2, 3, 4, 1, 3\)"),
        (lambda: image(np.zeros((2, 3), np.int16)), r"shape \(2, 3\)"),
        (lambda: image(np.zeros((2, 0, 4), np.int16)), r"shape \(2, 0, 4\).*at least one voxel"),
        (lambda: image(np.zeros((2, 3, 4), np.complex64)), "complex64.*real numbers"),
        (lambda: image(np.full((2, 3, 4), np.nan, np.float32)), "NaN"),
        (lambda: image(np.full((2, 3, 4), np.inf, np.float32)), "infinite"),
        (lambda: nib.Nifti1Image(LABELS, None), "no finite affine"),
    ],
)
def test_images_that_are_no_volume_are_refused(source, message):
    with pytest.raises(ValueError, match=message) as error:
        load_volume(source())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.diag([1.0, 0.0, 1.0, 1.0]), "singular affine"),
        (np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular affine"),
        (np.diag([1.0, np.nan, 1.0, 1.0]), "no finite affine"),
        (np.diag([1.0, np.inf, 1.0, 1.0]), "no finite affine"),
    ],
)
def test_broken_affines_are_refused(tmp_path, broken, message):
    made = image(LABELS)
    made.header.set_sform(broken, code=1)
    path = tmp_path / "a.nii"
    made.to_filename(path)  # nibabel writes the image's affine, so the sform is patched in the file
    raw = bytearray(path.read_bytes())
    raw[280:328] = broken[:3].astype("<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        load_volume(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def truncated(path):
    nib.save(image(np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)), path)
    path.write_bytes(path.read_bytes()[:-2000])


def flipped_bytes(path):
    truncated(path)
    raw = bytearray(path.read_bytes())
    raw[3000:3100] = bytes(100)
    path.write_bytes(raw)


def larger_than_memory(path):
    """By its header."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((30000, 30000, 30000))
    with gzip.open(path, "wb") as file:
        header.write_to(file)
        file.write(bytes(100))


def other_format(path):
    with gzip.open(path, "wb") as file:
        nib.MGHImage(np.zeros((2, 3, 4), np.float32), np.eye(4)).to_stream(file)


@pytest.mark.parametrize(
    ("name", "write", "error", "message"),
    [
        ("a.nii", lambda path: None, FileNotFoundError, "No file"),
        ("a.nii", lambda path: path.mkdir(), FileNotFoundError, "No file"),
        ("a.nii.gz", lambda path: path.touch(), ValueError, "empty"),
        ("a.nii", lambda path: path.write_text("not an image" * 100), ValueError, "NIfTI"),
        ("a.nii.gz", lambda path: path.write_text("not an image" * 100), ValueError, "NIfTI"),
        ("a.nii.gz", lambda path: path.write_bytes(gzip.compress(b"not an image" * 100)), ValueError, "NIfTI"),
        ("a.png", lambda path: path.write_text("not an image"), ValueError, "NIfTI"),
        ("a.mgz", other_format, ValueError, "MGHImage, must be a NIfTI"),
        ("a.nii", truncated, ValueError, "cut short"),
        ("a.nii.gz", truncated, ValueError, "cut short"),
        ("a.nii.gz", flipped_bytes, ValueError, "damaged"),
        ("a.nii.gz", larger_than_memory, ValueError, "damaged or cut short"),
    ],
)
@pytest.mark.parametrize("load", [load_volume, load_label_map])
def test_bad_files_are_refused_by_name(tmp_path, name, write, error, message, load):
    path = tmp_path / name
    write(path)
    with pytest.raises(error, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


SHEARED = AFFINE + np.array([[0.3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("affine", [AFFINE, SHEARED])
@pytest.mark.parametrize("kind", ["ct", "labels"])
def test_what_is_written_says_what_it_is(tmp_path, kind, affine):
    data = LABELS if kind == "labels" else LABELS - 1000.4
    made = (labels_to_nifti if kind == "labels" else ct_to_nifti)(data, affine)
    nib.save(made, tmp_path / "a.nii.gz")
    loaded = nib.load(tmp_path / "a.nii.gz")
    header = loaded.header
    assert header.get_data_dtype() == (np.uint8 if kind == "labels" else np.int16)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert np.allclose(header.get_sform(), affine)
    if affine is AFFINE:
        assert np.allclose(header.get_qform(), affine, atol=1e-5)
    assert np.allclose(header.get_zooms(), np.linalg.norm(affine[:3, :3], axis=0))
    assert header.get_xyzt_units() == ("mm", "sec")
    assert header["descrip"].item() == b"synthetic: maisi-diffusers"
    assert (np.asanyarray(loaded.dataobj) == np.rint(data)).all()
    assert np.isnan(header["scl_slope"]) or header["scl_slope"] == 1


def test_hu_is_rounded_and_clipped():
    hu = np.array([[[-1e6, -1000.6, -0.4, 39.6, 1e6]]], np.float32)
    assert values(ct_to_nifti(hu, AFFINE)).tolist() == [[[-32768, -1001, 0, 40, 32767]]]
