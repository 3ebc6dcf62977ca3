"""What a training would trip over later is said in one line before its first step, and nothing is written."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from maisi_diffusers.training.data_list import read_data_list
from maisi_diffusers.training.preflight import check_training_cases
from tests.scripts.training_data import error_of, on_latents, on_volumes, save_latent
from tests.tiny import make_label_map, make_pipeline


def edit_list(data, **changes):
    """Change the second entry of a copied data list."""
    content = json.loads((data / "list.json").read_text())
    content["training"][1] |= changes
    (data / "list.json").write_text(json.dumps(content))


def other_grid(data):
    save_latent(data / "case-1_emb.nii.gz", np.ones((4, 4, 8, 4), dtype=np.float32))
    make_label_map((16, 16, 32)).to_filename(data / "case-1_label.nii.gz")
    edit_list(data, dim=[16, 16, 32])


def off_grid(data):
    make_label_map((24, 16, 40)).to_filename(data / "case-1_label.nii.gz")
    edit_list(data, dim=[24, 16, 40])


def shifted_labels(data):
    labels = make_label_map()
    labels.affine[2, 3] += 30
    labels.to_filename(data / "case-1_label.nii.gz")


def volume(data):
    shutil.copy(data / "case-2_label.nii.gz", data / "case-1_emb.nii.gz")


def odd_grid(data):
    save_latent(data / "case-1_emb.nii.gz", np.ones((6, 5, 8, 4), dtype=np.float32))
    make_label_map((24, 20, 32)).to_filename(data / "case-1_label.nii.gz")
    edit_list(data, dim=[24, 20, 32])


def damaged(data):
    (data / "case-1_emb.nii.gz").write_bytes(b"no NIfTI")


def no_labels(data):
    edit_list(data, label=None)


def no_spacing(data):
    content = json.loads((data / "list.json").read_text())
    del content["training"][1]["spacing"]
    (data / "list.json").write_text(json.dumps(content))


BROKEN = {
    "missing latent": (
        lambda data: (data / "case-1_emb.nii.gz").unlink(),
        [],
        ["case-1_emb.nii.gz", "does not exist"],
    ),
    "missing label map": (
        lambda data: (data / "case-1_label.nii.gz").unlink(),
        [],
        ["case-1_label.nii.gz", "does not exist"],
    ),
    "no label map": (no_labels, [], ["entry 1: no label", "prepare it again"]),
    "two grids": (
        other_grid,
        ["--train_batch_size", 2],
        ["entry 1", "(4, 4, 8)", "(6, 4, 8)", "--gradient_accumulation_steps"],
    ),
    "labels off the grid": (off_grid, [], ["case-1_label.nii.gz", "(24, 16, 40)", "(24, 16, 32)", "resample it"]),
    "labels elsewhere": (shifted_labels, [], ["case-1_label.nii.gz", "another field of view", "resample it"]),
    "volume": (volume, [], ["case-1_emb.nii.gz", "is a volume, not a latent", "scripts/encode_latents.py"]),
    "size of no use": (odd_grid, [], ["(6, 5, 8)", "encode to a size that divides by 8"]),
    "no NIfTI": (damaged, [], ["case-1_emb.nii.gz", "cannot be read as NIfTI", "make it again"]),
    "no spacing": (no_spacing, [], ["entry 1: no spacing", "prepare it again"]),
}


@pytest.fixture
def data(latents, tmp_path):
    """A copy of the data set, to be changed."""
    return shutil.copytree(latents, tmp_path / "data")


@pytest.mark.parametrize("change, options, says", BROKEN.values(), ids=BROKEN)
def test_broken_cases(train_controlnet, data, change, options, says):
    change(data)
    message = error_of(train_controlnet, *on_latents(data, data / "output", *options))
    assert "1 problem(s)" in message and all(part in message for part in says), message
    assert not (data / "output").exists()


def test_only_the_first_of_many_problems(train_controlnet, data):
    for path in data.glob("*_emb.nii.gz"):
        path.unlink()
    message = error_of(train_controlnet, *on_latents(data, data / "output"))
    assert "8 problem(s)" in message and "(and 5 more)" in message and "--check looks at its files" in message
    assert message.count("does not exist") == 3


def test_two_grids_one_after_the_other(data):
    """What one batch cannot hold, batches of one can."""
    other_grid(data)
    unet = make_pipeline(with_mask_networks=False).unet
    data_list = read_data_list(data / "list.json")
    check_training_cases(data_list, unet, ratio=4, batch_size=1, with_labels=True)
    with pytest.raises(ValueError, match="cannot be in one batch"):
        check_training_cases(data_list, unet, ratio=4, batch_size=2, with_labels=True)


def test_regions_for_a_model_that_takes_them(data):
    unet = make_pipeline("ddpm-ct", with_mask_networks=False).unet
    data_list = read_data_list(data / "list.json")
    check_training_cases(data_list, unet, ratio=4, batch_size=1, with_labels=True)
    data_list.cases[3] = replace(data_list.cases[3], top_region_index=None, bottom_region_index=None)
    with pytest.raises(ValueError, match="entry 3: no top_region_index, bottom_region_index, which this model"):
        check_training_cases(data_list, unet, ratio=4, batch_size=1, with_labels=True)


def test_sizes_for_a_mask_unet(data):
    data_list = read_data_list(data / "list.json")
    with pytest.raises(ValueError, match=r"entry 0: no organ_size, which this model is trained with: add it to the"):
        check_training_cases(data_list, make_pipeline().mask_unet, ratio=4, batch_size=1, with_labels=False)


def test_label_maps_are_not_for_a_unet(data):
    unet = make_pipeline(with_mask_networks=False).unet
    no_labels(data)
    check_training_cases(read_data_list(data / "list.json"), unet, ratio=4, batch_size=1, with_labels=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fold", 9], ["fold 9", "[0, 1, 2, 3]", "choose one of them"]),
        (["--data_list", "missing.json"], ["'missing.json' does not exist", "scripts/prepare_dataset.py"]),
        (["--resume_from_checkpoint", "checkpoint-7"], ["no checkpoint 'checkpoint-7'", "it has none", "'latest'"]),
    ],
)
def test_what_is_not_there(train_controlnet, latents, tmp_path, options, says):
    message = error_of(train_controlnet, *on_latents(latents, tmp_path / "output", *options))
    assert all(part in message for part in says), message
    assert not (tmp_path / "output").exists()


def test_nothing_to_train(train_unet, train_vae, latents, volumes, tmp_path):
    arguments = ["--data_list", latents / "list.json", "--output_dir", tmp_path / "output"]
    assert "give --pretrained_model_name_or_path, or for a new UNet --vae_model" in error_of(train_unet, *arguments)
    vae = volumes / "vae"
    for options in ([], ["--vae_model_name_or_path", vae, "--vae_config_name_or_path", vae]):
        message = error_of(train_vae, *on_volumes(volumes, tmp_path / "output", *options))
        assert "give either --vae_model_name_or_path or, for a new VAE, --vae_config_name_or_path" in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--patch_size", 30], ["patch_size=(30, 30, 30)", "multiples of 4"]),
        (["--patch_size", 32, 32], ["patch_size=(32, 32)", "one number or three"]),
        (["--patch_size", 16], ["(16, 16, 16)", "at least 24", "train without it"]),
    ],
)
def test_patches_of_no_use(train_vae, volumes, tmp_path, options, says):
    vae = ["--vae_model_name_or_path", volumes / "vae"]
    message = error_of(train_vae, *on_volumes(volumes, tmp_path / "output", *vae, *options))
    assert all(part in message for part in says), message
    assert not list(tmp_path.rglob("*.safetensors"))


def test_missing_volume(train_vae, volumes, tmp_path):
    data = shutil.copytree(volumes, tmp_path / "data")
    (data / "case-1.nii.gz").unlink()
    vae = ["--vae_model_name_or_path", data / "vae"]
    message = error_of(train_vae, *on_volumes(data, tmp_path / "output", *vae))
    assert "case-1.nii.gz" in message and "correct the data list" in message
    assert not (tmp_path / "output").exists()
