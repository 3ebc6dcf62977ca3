"""Training of the diffusion UNet: a model's own, or a new one."""

import json

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from maisi_diffusers import MaisiCTPipeline, MaisiRFlowScheduler, MaisiUNet3DConditionModel
from maisi_diffusers.training.data_list import read_data_list, split_fold
from maisi_diffusers.training.dataset import LatentDataset
from maisi_diffusers.training.trackers import read_log
from tests.tiny import SIZE, SPACING, seeded

from .training_data import interrupt, make_latents, on_latents, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = ["--max_train_steps", 6, "--train_batch_size", 2, "--use_ema", "--modality_dropout", 0.5]
OPTIONS += ["--checkpointing_steps", 2, "--checkpoints_total_limit", 1]


@pytest.fixture(scope="module")
def continued(train_unet, latents, tmp_path_factory):
    """The model's own UNet trained on."""
    output = tmp_path_factory.mktemp("training") / "continued"
    run(train_unet, *on_latents(latents, output, *OPTIONS))
    return output


def from_parts(latents, output, *options):
    """Arguments for a new UNet."""
    parts = ["--vae_model_name_or_path", latents / "base" / "vae"]
    parts += ["--unet_config_name_or_path", latents / "base" / "unet" / "config.json"]
    return [*parts, "--data_list", latents / "list.json", "--output_dir", output, "--max_train_steps", 1, *options]


def test_output_is_a_pipeline(continued, latents):
    names = {"vae", "unet", "scheduler", "model_index.json", "README.md", "args.json", "log.jsonl", "checkpoint-6"}
    assert {path.name for path in continued.iterdir()} == names
    assert "image-only" in (continued / "README.md").read_text()
    pipe, base = (MaisiCTPipeline.from_pretrained(folder) for folder in (continued, latents / "base"))
    assert pipe.controlnet is None and pipe.vae.config.scaling_factor == base.vae.config.scaling_factor
    assert dict(pipe.scheduler.config) == dict(base.scheduler.config)
    for name, weight in base.vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], weight), name
    weights = pipe.unet.state_dict()
    assert not [name for name, weight in base.unet.state_dict().items() if torch.equal(weights[name], weight)]
    pipe.set_progress_bar_config(disable=True)
    arguments = {"image_only": True, "output_size": SIZE, "spacing": SPACING, "num_inference_steps": 2}
    image = pipe(**arguments, generator=seeded(), output_type="np").images
    assert image.shape == (1, *SIZE) and image.std() > 10


def test_settings_of_the_model_stay(train_unet, latents, tmp_path):
    base = MaisiCTPipeline.from_pretrained(latents / "base")
    base.register_to_config(modality="mri", num_inference_steps=7)
    base.save_pretrained(tmp_path / "base")
    source = ["--pretrained_model_name_or_path", tmp_path / "base"]
    run(train_unet, *on_latents(latents, tmp_path / "output", *source, "--max_train_steps", 1))
    config = MaisiCTPipeline.from_pretrained(tmp_path / "output").config
    assert (config.modality, config.num_inference_steps) == ("mri", 7)


def test_checkpoint_has_the_unet(continued):
    unet = MaisiUNet3DConditionModel.from_pretrained(continued / "checkpoint-6" / "unet")
    averages = load_file(continued / "unet" / WEIGHTS)
    assert all(torch.equal(weight, averages[name]) for name, weight in unet.state_dict().items())
    trained = load_file(continued / "checkpoint-6" / "model.safetensors")
    assert not torch.equal(trained["conv_in.weight"], averages["conv_in.weight"])


@pytest.mark.parametrize("steps", [1, 4])
def test_interrupted(train_unet, latents, continued, tmp_path, steps):
    """The weights, the averages and the log end as if nothing had happened."""
    arguments = on_latents(latents, tmp_path, *OPTIONS, "--resume_from_checkpoint", "latest")
    interrupt(train_unet, steps, *arguments)
    run(train_unet, *arguments)
    assert (tmp_path / "log.jsonl").read_text() == (continued / "log.jsonl").read_text()
    for name in (f"unet/{WEIGHTS}", "checkpoint-6/model.safetensors", "checkpoint-6/ema.safetensors"):
        assert (tmp_path / name).read_bytes() == (continued / name).read_bytes(), name


def test_scaling_factor_of_a_new_unet(train_unet, latents, tmp_path):
    """1 over the standard deviation of the first batch, the same from the same seed; or what is given."""
    run(train_unet, *from_parts(latents, tmp_path / "measured", "--train_batch_size", 6))
    pipe = MaisiCTPipeline.from_pretrained(tmp_path / "measured")
    cases, _ = split_fold(read_data_list(latents / "list.json").cases, 0)
    batch = torch.stack([LatentDataset(cases, pipe.scheduler, 0)[i]["latents"] for i in range(6)])
    assert pipe.vae.config.scaling_factor == pytest.approx(1 / batch.std().item(), rel=1e-6)
    assert isinstance(pipe.scheduler, MaisiRFlowScheduler) and pipe.config.num_inference_steps == 30

    run(train_unet, *from_parts(latents, tmp_path / "given", "--scaling_factor", 0.5))
    assert MaisiCTPipeline.from_pretrained(tmp_path / "given").vae.config.scaling_factor == 0.5


def test_new_unet_for_ddpm(train_unet, latents, tmp_path):
    run(train_unet, *from_parts(latents, tmp_path, "--noise_scheduler", "ddpm"))
    pipe = MaisiCTPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.scheduler, DDPMScheduler) and pipe.config.prediction_type == "epsilon"
    assert pipe.config.num_inference_steps == 1000 and not pipe.scheduler.config.clip_sample
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]


def test_ddpm_model_goes_on(train_unet, tmp_path):
    """Its regions are asked for, and its scheduler stays."""
    data = make_latents(tmp_path / "data", "ddpm-ct")
    run(train_unet, *on_latents(data, tmp_path / "output", "--max_train_steps", 2))
    index = json.loads((tmp_path / "output" / "model_index.json").read_text())
    assert index["scheduler"][1] == "DDPMScheduler" and index["prediction_type"] == "epsilon"
    assert all(0 < line["loss"] < 10 for line in read_log(tmp_path / "output" / "log.jsonl"))


def test_another_vae(train_unet, latents, volumes, tmp_path):
    """The VAE that encoded the latents goes into the pipeline."""
    run(
        train_unet, *on_latents(latents, tmp_path, "--vae_model_name_or_path", volumes / "vae", "--max_train_steps", 1)
    )
    assert (tmp_path / "vae" / WEIGHTS).read_bytes() == (volumes / "vae" / WEIGHTS).read_bytes()
