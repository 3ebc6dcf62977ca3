"""A linear VAE for a data list, which training goes on with."""

import json

import pytest

from maisi_diffusers import AutoencoderKLMaisi

from .training_data import load_script, run

CONFIG = {
    "_class_name": "AutoencoderKLMaisi",
    "block_out_channels": [8, 16],
    "latent_channels": 6,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "norm_eps": 1.0,
    "use_conv_transpose": True,
}


@pytest.fixture
def arguments(tmp_path):
    small = ["--num_cases", "3", "--size", "32", "32", "32", "--spacing", "12", "--num_folds", "3"]
    load_script("make_phantoms").main(["--output_dir", str(tmp_path / "phantoms"), *small])
    (tmp_path / "vae.json").write_text(json.dumps(CONFIG))
    data_list = str(tmp_path / "phantoms" / "dataset.json")
    config = str(tmp_path / "vae.json")
    return ["--vae_config_name_or_path", config, "--data_list", data_list, "--output_dir", str(tmp_path / "vae")]


def test_training_goes_on_with_it(arguments, tmp_path):
    load_script("start_vae").main(arguments)
    vae = AutoencoderKLMaisi.from_pretrained(tmp_path / "vae")
    assert vae.config.latent_channels == 6 and not vae.encoder.down_blocks[0].resnets[0].conv2.weight.any()

    settings = {"patch_size": 16, "train_batch_size": 1, "max_train_steps": 2, "perceptual_weight": 0}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    given = ["--vae_model_name_or_path", tmp_path / "vae", *arguments[2:4], "--output_dir", tmp_path / "trained"]
    run(load_script("train_vae"), *given, *options, "--adversarial_weight", "0")
    vae = AutoencoderKLMaisi.from_pretrained(tmp_path / "trained")
    assert vae.encoder.down_blocks[0].resnets[0].conv2.weight.any()


def test_a_window(arguments, tmp_path):
    """Of HU, in the encoder's first residual block and the decoder's last."""
    load_script("start_vae").main([*arguments, "--window", "-160", "240", "--window_gain", "3"])
    vae = AutoencoderKLMaisi.from_pretrained(tmp_path / "vae")
    for resnet in (vae.encoder.down_blocks[0].resnets[0], vae.decoder.up_blocks[-1].resnets[-1]):
        assert resnet.conv2.weight.any() and not resnet.conv2.weight[:, :, 0].any()
    load_script("start_vae").main([*arguments, "--window", "-160", "240", "--air", "-900"])
    vae = AutoencoderKLMaisi.from_pretrained(tmp_path / "vae")
    assert vae.decoder.up_blocks[-1].resnets[-1].conv2.weight[:, :, 0].any()  # of neighbours


def test_a_list_of_one_fold(arguments, tmp_path):
    """All cases are to learn from."""
    path = tmp_path / "phantoms" / "dataset.json"
    content = json.loads(path.read_text())
    for entry in content["training"]:
        del entry["fold"]
    path.write_text(json.dumps(content))
    load_script("start_vae").main([*arguments, "--num_cases", "2"])
    assert (tmp_path / "vae" / "config.json").is_file()


def test_a_config_that_cannot_be_linear(arguments, tmp_path):
    (tmp_path / "vae.json").write_text(json.dumps(CONFIG | {"use_conv_transpose": False}))
    with pytest.raises(ValueError, match="cannot be linear"):
        load_script("start_vae").main(arguments)
    assert not (tmp_path / "vae").exists()
