"""`maisi-ct preview`: a picture of any CT, with any label map of it."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers.imaging import ct_to_nifti
from tests.tiny import make_label_map

from .running import error_of, run, run_json


@pytest.fixture
def ct(tmp_path):
    labels = make_label_map()
    path = tmp_path / "ct.nii.gz"
    nib.Nifti1Image((np.asarray(labels.dataobj) * 4 - 100).astype(np.int16), labels.affine).to_filename(path)
    return path


def test_picture(ct, mask, tmp_path):
    result = run("preview", ct, mask, "-o", tmp_path / "picture.png", "--force")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path / 'picture.png'}\n", "")
    with_labels = (tmp_path / "picture.png").read_bytes()
    assert with_labels.startswith(b"\x89PNG")
    assert run_json("preview", ct) == {"picture": str(tmp_path / "ct.png"), "warnings": []}
    assert (tmp_path / "ct.png").read_bytes() != with_labels


def picture(tmp_path, *arguments):
    run_json("preview", *arguments, "-o", tmp_path / "picture.png", "--force")
    return (tmp_path / "picture.png").read_bytes()


def test_windows(ct, tmp_path):
    pictures = {picture(tmp_path, ct, "--window", name) for name in ("soft", "lung", "bone", "wide")}
    assert len(pictures) == 4 and picture(tmp_path, ct) in pictures
    assert picture(tmp_path, ct, "--range", -160, 240) == picture(tmp_path, ct, "--window", "soft")
    assert picture(tmp_path, ct, "--range", -160, 241) not in pictures


def test_labels_on_another_grid(ct, mask, tmp_path):
    finer = make_label_map((48, 32, 64), (1.0, 1.0, 1.5))
    # Voxels of half the size have their centres a quarter of a large one off.
    finer.affine[:3, 3] = [-0.5, -0.5, -0.75]
    finer.to_filename(tmp_path / "finer.nii.gz")
    assert picture(tmp_path, ct, tmp_path / "finer.nii.gz") == picture(tmp_path, ct, mask)


def test_a_synthetic_ct_is_said_to_be(ct, tmp_path):
    image = nib.load(ct)
    shutil.copy(ct, tmp_path / "real.nii.gz")
    ct_to_nifti(np.asarray(image.dataobj), image.affine).to_filename(ct)
    synthetic = picture(tmp_path, ct)
    assert synthetic != picture(tmp_path, tmp_path / "real.nii.gz")
    assert synthetic == picture(tmp_path, ct, "--title", "SYNTHETIC · ct")


@pytest.mark.slow
def test_the_real_torso(torso_ct, torso_labels, tmp_path):
    said = run_json(
        "preview", torso_ct, torso_labels, "--vocabulary", "totalsegmentator", "-o", tmp_path / "torso.png"
    )
    assert said["warnings"] == [] and (tmp_path / "torso.png").stat().st_size > 100_000
    said = run_json("preview", torso_ct, torso_labels, "-o", tmp_path / "torso.png", "--force")
    assert "if it is from there, read it as 'totalsegmentator'" in said["warnings"][0]


def test_errors(ct, mask, tmp_path):
    assert "give the lower number first" in error_of("preview", ct, "--range", 240, -160, code=2)
    assert "'bones' is not one of" in error_of("preview", ct, "--window", "bones", code=2)
    (tmp_path / "bad.nii.gz").write_text("no image")
    assert "cannot be read as NIfTI" in error_of("preview", tmp_path / "bad.nii.gz")
    assert "holds floating-point labels" in error_of("preview", ct, floating(tmp_path))
    assert "let it end in .png" in error_of("preview", ct, "-o", mask, code=2)
    said = run("preview", ct, tmp_path / "bad.nii.gz", "--json")
    assert (said.exit_code, said.stderr) == (1, "") and "cannot be read" in json.loads(said.stdout)["error"]
    assert not list(tmp_path.glob("**/*.png"))


def test_a_picture_is_not_replaced_unasked(ct, tmp_path):
    run_json("preview", ct, "-o", tmp_path / "new" / "ct.png")
    before = (tmp_path / "new" / "ct.png").read_bytes()
    assert "--force to replace it" in error_of("preview", ct, "--window", "bone", "-o", tmp_path / "new" / "ct.png")
    assert (tmp_path / "new" / "ct.png").read_bytes() == before


def floating(tmp_path):
    nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)).to_filename(tmp_path / "floating.nii.gz")
    return tmp_path / "floating.nii.gz"
