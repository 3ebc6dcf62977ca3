"""The model inside the package."""

import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy import ndimage

from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline
from maisi_diffusers.anatomy import (
    CONTROLLABLE_ANATOMY,
    LABELS,
    LUNG_LOBES,
    TUMORS,
    fit_tumor,
    label_name,
    totalsegmentator_to_maisi,
)
from maisi_diffusers.anatomy.clean_up import SINGLE_ORGANS
from maisi_diffusers.phantom import make_phantom

from .tiny import seeded


@pytest.fixture(scope="module")
def pipe():
    pipe = MaisiCTPipeline.from_pretrained(PHANTOM_TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files():
    """Small, in half precision, and with a card that says what it is not for."""
    weights = list(PHANTOM_TINY.glob("*/*.safetensors"))
    assert {path.parent.name for path in weights} == {"vae", "unet", "controlnet", "mask_vae", "mask_unet"}
    assert sum(path.stat().st_size for path in PHANTOM_TINY.rglob("*") if path.is_file()) < 30e6
    assert sum(path.stat().st_size for path in weights) < 25e6
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    assert "What it is not for" in (PHANTOM_TINY / "README.md").read_text()


def test_mask_database(pipe):
    """Every region and every tumor can be looked up."""
    for region in ("head", "chest", "abdomen", "pelvis"):
        grid = {"output_size": (128, 128, 128), "spacing": (3.0, 3.0, 3.0)}
        assert pipe.mask_database.find(1, seeded(), body_region=[region], **grid)
    for tumor in TUMORS:
        assert any(tumor in entry.label_list for entry in pipe.mask_database.entries), tumor


def test_size_conditions(pipe):
    assert len(pipe.anatomy_size_conditions) >= 100
    assert all(len(sizes) == len(CONTROLLABLE_ANATOMY) for sizes in pipe.anatomy_size_conditions)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc")
def test_the_first_command(tmp_path):
    """README's: four files, the same each time, in less than the memory of a laptop."""
    code = "import sys; from maisi_diffusers.cli.app import app\n"
    # Of this process alone: what getrusage calls its peak is at least that of the process that started it.
    code += "try: app()\nfinally: print(open('/proc/self/status').read(), file=sys.stderr)"
    contents = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        command = [sys.executable, "-c", code, "generate", "--output", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(re.search(r"VmHWM:\s*(\d+) kB", done.stderr)[1]) * 1024 < 4e9
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    stem = "maisi-phantom-tiny_seed0"
    assert contents[0].keys() == {f"{stem}_ct.nii.gz", f"{stem}_labels.nii.gz", f"{stem}.png", f"{stem}.json"}
    assert contents[0] == contents[1]


@torch.no_grad()
def test_slabs_show_no_seams(pipe):
    """Of a CT of a phantom; in HU, and where slabs meet no more than elsewhere."""
    phantom = make_phantom(seed=987_654, size=(64, 64, 64), spacing=(6.0, 6.0, 6.0))
    ct = torch.tensor(np.asarray(phantom.image.dataobj)).float()[None, None]
    pipe.vae.disable_tiling()
    latents = pipe.vae.encode((ct + 1000) / 2000).latent_dist.mode()
    expected = 2000 * pipe.vae.decode(latents).sample
    assert expected.std() > 100
    for enable in (pipe.vae.enable_exact_tiling, pipe.vae.enable_tiling):
        enable("3MB")  # of a plane or two
        assert (2000 * pipe.vae.decode(latents).sample - expected).abs().max() < 0.05
    pipe.vae.enable_auto_tiling()


@pytest.mark.slow
def test_a_generated_label_map(pipe):
    """By the rules of the clean-up, with the tumor in the size that was asked for; its CT passes the check."""
    sizes = [("hepatic tumor", 0.3), ("liver", 0.5)]
    out = pipe(controllable_anatomy_size=sizes, generator=seeded())
    labels, report = np.asarray(out.labels[0].dataobj), out.reports[0]
    assert report["quality"]["passed"]
    assert set(TUMORS) & set(np.unique(labels)) == {LABELS["hepatic tumor"]}
    reached = {name: one["reached"] for name, one in report["label_map"]["anatomy"].items()}
    assert reached["hepatic tumor"] == pytest.approx(0.3, abs=0.01) and reached["liver"] == pytest.approx(0.5, abs=0.2)
    assert pieces(labels > 0) == 1
    for label in set(np.unique(labels)) & set(SINGLE_ORGANS):
        assert pieces(labels == label) == 1, label_name(label)
    # Each voxel of the tumor touches the liver, or the tumor, alone.
    around = ndimage.binary_dilation(labels == LABELS["hepatic tumor"], np.ones((3, 3, 3))) & (labels != 26)
    assert (labels[around] == LABELS["liver"]).mean() > 0.8


def pieces(mask: np.ndarray) -> int:
    return ndimage.label(mask, np.ones((3, 3, 3)))[1]


@pytest.mark.slow
def test_a_tumor_that_is_looked_up(pipe):
    out = pipe(body_region=["chest"], anatomy_list=["lung tumor"], generator=seeded())
    labels = np.asarray(out.labels[0].dataobj)
    assert out.reports[0]["quality"]["passed"] and (labels == LABELS["lung tumor"]).sum() > 10


@pytest.mark.slow
def test_a_real_label_map(pipe, torso_labels):
    out = pipe(mask=torso_labels, mask_vocabulary="totalsegmentator", generator=seeded())
    quality = out.reports[0]["quality"]
    assert quality["passed"] and {"liver", "spleen", "pancreas", "kidney", "bone"} <= quality["organs"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "lowest", "highest"), [("ct_wo_contrast", 12, 40), ("ct_contrast", 26, 66)])
def test_a_tumor_in_a_real_ct(pipe, torso_ct, torso_labels, modality, lowest, highest):
    """It has the HU of those that the model has seen; the CT around it is as it was."""
    image = nib.load(torso_ct)
    ct, spacing = np.asarray(image.dataobj), image.header.get_zooms()
    organs = totalsegmentator_to_maisi(np.asarray(nib.load(torso_labels).dataobj))
    labels = fit_tumor(organs, LABELS["hepatic tumor"], ml=14, spacing=spacing, generator=seeded())
    tumor, mask = labels == LABELS["hepatic tumor"], nib.Nifti1Image(labels, image.affine)
    out = pipe(image=image, mask=mask, repaint_labels=["hepatic tumor"], modality=modality, generator=seeded(1))
    made = np.asarray(out.images[0].dataobj)
    assert lowest <= np.median(made[tumor]) <= highest
    distance = ndimage.distance_transform_edt(~tumor, sampling=spacing)
    assert np.array_equal(made[distance >= 6], ct[distance >= 6])


@pytest.mark.slow
def test_a_ct_for_a_label_map(pipe):
    """Of a phantom that it has not seen: lungs, liver and bones have the HU of such."""
    phantom = make_phantom(
        seed=987_654, body_region=["chest", "abdomen"], size=(128, 128, 128), spacing=(3.0, 3.0, 3.0)
    )
    out = pipe(mask=phantom.labels, modality="ct_wo_contrast", generator=seeded())
    image, labels = (np.asarray(one[0].dataobj) for one in (out.images, out.labels))
    assert np.median(image[np.isin(labels, LUNG_LOBES)]) == pytest.approx(-820, abs=80)
    assert np.median(image[labels == LABELS["liver"]]) == pytest.approx(55, abs=30)
    assert np.median(image[labels == LABELS["vertebrae L1"]]) > 120
    assert out.reports[0]["quality"]["passed"]
