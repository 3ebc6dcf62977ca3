"""A ControlNet that begins as the best linear one, which training goes on with; and the UNet with it."""

import pytest
import torch
from safetensors.torch import load_file

from maisi_diffusers import MaisiControlNetModel, MaisiCTPipeline
from maisi_diffusers.training.trackers import read_log

from .training_data import NEW_CLASS, NEW_LABEL, load_script, make_latents, on_latents, run

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The latents, and the ControlNet for them."""
    latents = make_latents(tmp_path_factory.mktemp("latents"))
    output = latents / "linear"
    options = ["--pretrained_model_name_or_path", str(latents / "base"), "--data_list", str(latents / "list.json")]
    load_script("start_controlnet").main([*options, "--num_cases", "3", "--output_dir", str(output)])
    return latents, output


def test_what_is_written(started):
    latents, output = started
    controlnet = MaisiControlNetModel.from_pretrained(output)
    assert controlnet.config.label_names == {NEW_CLASS: NEW_LABEL}
    assert controlnet.controlnet_cond_embedding.conv_out.weight.any()
    assert not any(block.weight.any() for block in controlnet.controlnet_down_blocks)
    unet = MaisiCTPipeline.from_pretrained(latents / "base").unet
    assert torch.equal(controlnet.conv_in.weight, unet.conv_in.weight)


def train(started, output, *options):
    latents, linear = started
    start = ["--controlnet_model_name_or_path", linear, "--max_train_steps", 6, "--checkpointing_steps", 4]
    run(load_script("train_controlnet"), *on_latents(latents, output, *start, *options))


def test_training_goes_on_with_it(started, tmp_path):
    train(started, tmp_path / "trained")
    trained, linear = load_file(tmp_path / "trained" / WEIGHTS), load_file(started[1] / WEIGHTS)
    name = "controlnet_cond_embedding.conv_out.weight"
    assert not torch.equal(trained[name], linear[name])
    assert torch.allclose(trained[name], linear[name], atol=0.05)


@pytest.mark.parametrize("averages", [[], ["--use_ema", "--ema_decay", 0.5]], ids=["last", "averaged"])
def test_with_the_unet(started, tmp_path, averages):
    """Some steps leave the ControlNet out; what comes out is a model."""
    latents, _ = started
    options = [
        "--train_unet",
        "--controlnet_dropout",
        0.5,
        "--lr_scheduler",
        "constant",
        "--validation_steps",
        6,
        *averages,
    ]
    train(started, tmp_path / "whole", *options, "--validation_num_inference_steps", 1)
    log = read_log(tmp_path / "whole" / "log.jsonl")
    kinds = ["unet_loss" if "unet_loss" in line else "loss" for line in log if "validation_loss" not in line]
    assert len(kinds) == 6 and set(kinds) == {"loss", "unet_loss"}

    pipe, base = (MaisiCTPipeline.from_pretrained(folder) for folder in (tmp_path / "whole", latents / "base"))
    assert NEW_CLASS in pipe.vocabulary
    before = base.unet.state_dict()
    same = [name for name, weight in pipe.unet.state_dict().items() if torch.equal(weight, before[name])]
    assert not same
    assert all(torch.equal(weight, base.vae.state_dict()[name]) for name, weight in pipe.vae.state_dict().items())
    assert pipe.controlnet.controlnet_mid_block.weight.any()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    if not averages:
        state = load_file(checkpoint / "model_1.safetensors")
        saved = load_file(checkpoint / "unet" / WEIGHTS)
        assert all(torch.equal(weight, state[name]) for name, weight in saved.items())

    train(started, tmp_path / "again", *options, "--validation_num_inference_steps", 1, "--max_train_steps", 4)
    resumed = ["--resume_from_checkpoint", "latest"]
    train(started, tmp_path / "again", *options, "--validation_num_inference_steps", 1, *resumed)
    again = MaisiCTPipeline.from_pretrained(tmp_path / "again")
    for one, other in ((pipe.unet, again.unet), (pipe.controlnet, again.controlnet)):
        assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())
