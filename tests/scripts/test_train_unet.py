"""Training of the diffusion UNet: a model's own, or a new one."""

import json

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from maisi_diffusers import (
    AutoencoderKLMaisi,
    MaisiCTPipeline,
    MaisiMaskPipeline,
    MaisiRFlowScheduler,
    MaisiUNet3DConditionModel,
)
from maisi_diffusers.pipelines.input_rules import MR_RULES
from maisi_diffusers.training.data_list import read_data_list, split_fold
from maisi_diffusers.training.dataset import LatentDataset
from maisi_diffusers.training.trackers import read_log
from tests.tiny import SIZE, SPACING, seeded

from .training_data import error_of, interrupt, make_latents, on_latents, run

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
    settings = {
        "modality": "mri",
        "num_inference_steps": 7,
        "guidance_scale": 15.0,
        "default_output_size": [32, 32, 32],
        "default_spacing": [3.0, 3.0, 3.0],
        "quality_thresholds": {"liver": [0, 100]},
        "recommended_fovs": {"t1": {"head": [[160, 256, 256]]}},
        "input_rules": MR_RULES,
    }
    base.register_to_config(**settings, modalities=["mri"])
    base.save_pretrained(tmp_path / "base")
    source = ["--pretrained_model_name_or_path", tmp_path / "base"]
    run(train_unet, *on_latents(latents, tmp_path / "output", *source, "--max_train_steps", 1))
    config = MaisiCTPipeline.from_pretrained(tmp_path / "output").config
    assert {name: config[name] for name in settings} == settings
    assert config.modalities is None  # the data may have others


def test_scaling_factor_is_measured_once(train_unet, latents, tmp_path):
    """In another batch it would be another one."""
    arguments = from_parts(latents, tmp_path, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    run(train_unet, *arguments)
    before = AutoencoderKLMaisi.load_config(tmp_path / "vae")["scaling_factor"]
    run(train_unet, *arguments, "--max_train_steps", 2, "--train_batch_size", 2)
    assert AutoencoderKLMaisi.load_config(tmp_path / "vae")["scaling_factor"] == before


def test_checkpoint_has_the_unet(continued):
    unet = MaisiUNet3DConditionModel.from_pretrained(continued / "checkpoint-6" / "unet")
    averages = load_file(continued / "unet" / WEIGHTS)
    assert all(torch.equal(weight, averages[name]) for name, weight in unet.state_dict().items())
    trained = load_file(continued / "checkpoint-6" / "model.safetensors")
    assert not torch.equal(trained["conv_in.weight"], averages["conv_in.weight"])


def test_labels_that_weigh_more(train_unet, latents, continued, tmp_path):
    """The loss of the first step, of the same weights and noise, is larger by what the labels' voxels weigh."""
    weighted = ["--weighted_loss_label", 1, "--weighted_loss"]
    folders = {1: tmp_path / "same", 20: tmp_path / "more"}
    for weight, folder in folders.items():
        run(train_unet, *on_latents(latents, folder, *OPTIONS, *weighted, weight, "--max_train_steps", 1))
    plain, one, more = (read_log(folder / "log.jsonl")[0]["loss"] for folder in (continued, *folders.values()))
    assert one == plain and more > 1.2 * plain


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


# Label maps


MASK_OPTIONS = ["--max_train_steps", 6, "--train_batch_size", 2, "--checkpointing_steps", 4, "--validation_steps", 6]
MASK_OPTIONS += ["--num_validation_images", 1, "--validation_num_inference_steps", 2]


def new_mask_unet(data, output, *options):
    """Arguments for a new UNet of label maps."""
    parts = ["--vae_model_name_or_path", data / "base" / "mask_vae"]
    parts += ["--unet_config_name_or_path", data / "base" / "mask_unet" / "config.json"]
    return [*parts, "--data_list", data / "list.json", "--output_dir", output, "--learning_rate", 1e-3, *options]


@pytest.fixture(scope="module")
def masks(train_unet, mask_latents, tmp_path_factory):
    output = tmp_path_factory.mktemp("training") / "masks"
    run(train_unet, *new_mask_unet(mask_latents, output, *MASK_OPTIONS))
    return output


def test_output_is_a_mask_pipeline(masks, mask_latents):
    names = {"mask_vae", "mask_unet", "mask_scheduler", "model_index.json", "README.md", "args.json", "log.jsonl"}
    assert {path.name for path in masks.iterdir()} == names | {"checkpoint-4", "validation"}
    assert "MaisiMaskPipeline.from_pretrained" in (masks / "README.md").read_text()
    pipe = MaisiMaskPipeline.from_pretrained(masks)
    assert isinstance(pipe.mask_scheduler, MaisiRFlowScheduler)
    assert pipe.config.mask_prediction_type == "flow_prediction" and pipe.config.mask_num_inference_steps is None
    assert pipe.config.mask_latent_size == [n // 4 for n in SIZE]
    assert pipe.config.mask_spacing == pytest.approx(SPACING)
    cases, _ = split_fold(read_data_list(mask_latents / "list.json").cases, 0)
    assert 0.9 < pipe.mask_vae.config.scaling_factor < 1.1, "1 over the standard deviation of the first batch"

    pipe.set_progress_bar_config(disable=True)
    (mask,) = pipe(anatomy_size=[0.5] * 5 + [-1] * 5, generator=seeded(), num_inference_steps=2).masks
    assert mask.shape == SIZE
    MaisiUNet3DConditionModel.from_pretrained(masks / "checkpoint-4" / "mask_unet")


def test_sizes_are_learnt_from(masks, mask_latents, train_unet, tmp_path):
    """Other sizes, other weights."""
    content = json.loads((mask_latents / "list.json").read_text())
    for entry in content["training"]:
        entry["image"] = str(mask_latents / entry["image"])
        entry["organ_size"] = [0.9] * 5 + [-1] * 5
    (tmp_path / "list.json").write_text(json.dumps(content))
    arguments = new_mask_unet(mask_latents, tmp_path / "output", *MASK_OPTIONS, "--data_list", tmp_path / "list.json")
    run(train_unet, *arguments)
    losses = [[line["loss"] for line in read_log(folder / "log.jsonl")[:6]] for folder in (masks, tmp_path / "output")]
    assert losses[0] != losses[1]
    before, after = (load_file(folder / "mask_unet" / WEIGHTS) for folder in (masks, tmp_path / "output"))
    names = [name for name in before if "attn2" in name]
    assert names and not any(torch.equal(before[name], after[name]) for name in names)


def test_validation_of_label_maps(masks):
    """A picture for each of the held-out cases, of one of its two tumors."""
    assert [path.name for path in (masks / "validation" / "step-6").iterdir()] == ["0-case-0_emb.png"]
    log = read_log(masks / "log.jsonl")
    assert log[-1].keys() == {"step", "validation_loss"} and 0 < log[-1]["validation_loss"] < 10


def test_mask_pipeline_goes_on(train_unet, mask_latents, tmp_path):
    """With its scheduler, its number of steps and its scaling factor, and on the grid of the new latents."""
    run(train_unet, *on_latents(mask_latents, tmp_path, "--max_train_steps", 1))
    pipe, base = (MaisiMaskPipeline.from_pretrained(folder) for folder in (tmp_path, mask_latents / "base"))
    assert pipe.config.mask_num_inference_steps == 2 and pipe.config.mask_latent_size == [n // 4 for n in SIZE]
    assert pipe.mask_vae.config.scaling_factor == base.mask_vae.config.scaling_factor
    assert dict(pipe.mask_scheduler.config) == dict(base.mask_scheduler.config)


def test_new_mask_unet_for_ddpm(train_unet, mask_latents, tmp_path):
    run(train_unet, *new_mask_unet(mask_latents, tmp_path, "--max_train_steps", 1, "--noise_scheduler", "ddpm"))
    pipe = MaisiMaskPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.mask_scheduler, DDPMScheduler) and pipe.config.mask_prediction_type == "epsilon"


def test_parts_that_do_not_belong_together(train_unet, mask_latents, latents, tmp_path):
    images, masks = latents / "base", mask_latents / "base"
    for vae, unet, says in (
        (images / "vae", masks / "mask_unet", "is of images and needs a UNet with {'cross_attention_dim': None}"),
        (masks / "mask_vae", images / "unet", "is of label maps and needs a UNet with {'cross_attention_dim': 10,"),
    ):
        options = ["--vae_model_name_or_path", vae, "--unet_config_name_or_path", unet / "config.json"]
        message = error_of(train_unet, *new_mask_unet(mask_latents, tmp_path / "output", *options))
        assert says in message and "correct --unet_config_name_or_path, or give the VAE" in message
    message = error_of(
        train_unet,
        *new_mask_unet(mask_latents, tmp_path / "output", "--pretrained_model_name_or_path", images),
    )
    assert "the VAE is of label maps, --pretrained_model_name_or_path is not" in message
    assert not (tmp_path / "output").exists()


def test_cases_without_sizes(train_unet, mask_latents, latents, tmp_path):
    arguments = new_mask_unet(mask_latents, tmp_path / "output", "--data_list", latents / "list.json")
    message = error_of(train_unet, *arguments)
    assert "entry 0: no organ_size, which this model is trained with: add it to the data list" in message
    assert not (tmp_path / "output").exists()
