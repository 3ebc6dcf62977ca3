"""Training of the ControlNet: what it writes, and what the pipeline makes of it."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, safe_open

from maisi_diffusers import AutoencoderKLMaisi, MaisiControlNetModel, MaisiCTPipeline
from maisi_diffusers.anatomy import label_index
from maisi_diffusers.training.checkpoints import list_checkpoints
from maisi_diffusers.training.trackers import read_log
from tests.tiny import make_label_map, make_pipeline, seeded

from .training_data import (
    NEW_CLASS,
    NEW_LABEL,
    ORGANS,
    SCRIPTS,
    error_of,
    load_script,
    make_latents,
    on_latents,
    run,
    save_latent,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "pytorch_lora_weights.safetensors"
# Rank 2 of networks as small as these is still a sizeable part of them.
LORA = ["--use_lora", "--rank", 2, "--lora_alpha", 3]


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def size_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize(("levels", "channels"), [(2, (8, 32)), (3, (8, 32, 64)), (4, (8, 32, 64, 64))])
def test_new_controlnet_for_any_compression(levels, channels):
    """It brings the label map to the grid of the latent."""
    pipe = make_pipeline()
    vae = AutoencoderKLMaisi(block_out_channels=(8,) * levels, layers_per_block=1, norm_num_groups=4)
    pipe.register_modules(vae=vae, controlnet=None)
    args = SimpleNamespace(controlnet_model_name_or_path="unet", use_lora=False, freeze_condition_embedding=False)
    data_list = SimpleNamespace(label_names={}, tumor_organs={})
    controlnet = load_script("train_controlnet").load_controlnet(args, pipe, data_list)
    assert controlnet.config.conditioning_embedding_out_channels == channels
    bits = torch.zeros(1, 8, 16, 16, 32)
    assert controlnet.embed_condition(bits).shape[2:] == vae.encode(bits[:, :1]).latent_dist.mean.shape[2:]


def load_pipeline(latents, **components):
    pipe = MaisiCTPipeline.from_pretrained(latents / "base", **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_image(pipe):
    return pipe(mask=make_label_map(), num_inference_steps=2, generator=seeded(), output_type="np").images


@pytest.fixture(scope="module")
def finetuned(train_controlnet, latents, tmp_path_factory):
    """All weights, for five steps; the same averaged, after every step."""
    output = tmp_path_factory.mktemp("training") / "finetuned"
    options = ["--max_train_steps", 5, "--checkpointing_steps", 2, "--checkpoints_total_limit", 1]
    run(train_controlnet, *on_latents(latents, output, *options))
    return output


@pytest.fixture(scope="module")
def adapter(train_controlnet, latents, tmp_path_factory):
    """An adapter alone, for two steps."""
    output = tmp_path_factory.mktemp("training") / "adapter"
    run(train_controlnet, *on_latents(latents, output, *LORA, "--max_train_steps", 2, "--checkpointing_steps", 2))
    return output


@pytest.fixture(scope="module")
def base_weights(latents):
    return load_file(latents / "base" / "controlnet" / WEIGHTS)


def test_output(finetuned):
    state = {"model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"}
    state |= {"controlnet/config.json", f"controlnet/{WEIGHTS}"}
    expected = {"README.md", "args.json", "config.json", "log.jsonl", WEIGHTS}
    assert files_of(finetuned) == expected | {f"checkpoint-4/{name}" for name in state}
    assert [line["step"] for line in read_log(finetuned / "log.jsonl")] == [1, 2, 3, 4, 5]
    args = json.loads((finetuned / "args.json").read_text())
    assert (args["max_train_steps"], args["learning_rate"], args["num_processes"]) == (5, 1e-3, 1)
    assert args["weighted_loss_label"] == [NEW_LABEL]  # the data list's


def test_model_card(finetuned, adapter):
    card, adapter_card = ((folder / "README.md").read_text() for folder in (finetuned, adapter))
    for text in (card, adapter_card):
        assert text.startswith("---\n") and "library_name: diffusers" in text and "- maisi" in text
        assert f"{NEW_CLASS} ({NEW_LABEL})" in text and "6 cases" in text and "synthetic" in text
    assert "MaisiControlNetModel.from_pretrained" in card and "load_lora_weights" in adapter_card


def test_weights_change_in_all_layers(finetuned, base_weights):
    weights = load_file(finetuned / WEIGHTS)
    assert weights.keys() == base_weights.keys()
    unchanged = [name for name, weight in weights.items() if torch.equal(weight, base_weights[name])]
    assert not unchanged and all(weight.isfinite().all() for weight in weights.values())


def test_frozen_embedding(train_controlnet, latents, base_weights, tmp_path):
    options = ["--freeze_condition_embedding", "--max_train_steps", 1, "--use_ema"]
    run(train_controlnet, *on_latents(latents, tmp_path / "output", *options))
    weights = load_file(tmp_path / "output" / WEIGHTS)
    unchanged = {name for name, weight in weights.items() if torch.equal(weight, base_weights[name])}
    assert unchanged == {name for name in weights if name.startswith("controlnet_cond_embedding.")} != set()

    options = ["--freeze_condition_embedding", "--use_lora"]
    message = error_of(train_controlnet, *on_latents(latents, tmp_path / "adapter", *options))
    assert "leave it or --freeze_condition_embedding out" in message and not (tmp_path / "adapter").exists()


def test_in_a_pipeline(latents, finetuned):
    controlnet = MaisiControlNetModel.from_pretrained(finetuned)
    pipe, base = load_pipeline(latents, controlnet=controlnet), load_pipeline(latents)
    assert NEW_CLASS in pipe.vocabulary and NEW_CLASS not in base.vocabulary
    assert label_index(NEW_CLASS, pipe.vocabulary) == NEW_LABEL
    assert pipe.tumors[NEW_LABEL] == tuple(pipe.vocabulary[organ] for organ in ORGANS)
    difference = np.abs(make_image(pipe) - make_image(base))
    assert 0.1 < difference.mean() < 500


def test_model_of_a_checkpoint(finetuned):
    controlnet = MaisiControlNetModel.from_pretrained(finetuned / "checkpoint-4" / "controlnet")
    assert controlnet.config.label_names == {NEW_CLASS: NEW_LABEL}
    state = load_file(finetuned / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(weight, state[name]) for name, weight in controlnet.state_dict().items())


def test_second_finetuning_keeps_the_class_of_the_first(train_controlnet, latents, finetuned, tmp_path):
    content = json.loads((latents / "list.json").read_text())
    content |= {"label_names": {"cyst": 130}, "tumor_organs": {}}
    (tmp_path / "list.json").write_text(json.dumps(content))
    source = ["--controlnet_model_name_or_path", finetuned, "--data_root", latents]
    options = ["--data_list", tmp_path / "list.json", "--max_train_steps", 1]
    run(train_controlnet, *on_latents(latents, tmp_path / "output", *source, *options))
    pipe = load_pipeline(latents, controlnet=MaisiControlNetModel.from_pretrained(tmp_path / "output"))
    assert (pipe.vocabulary[NEW_CLASS], pipe.vocabulary["cyst"]) == (NEW_LABEL, 130)
    assert NEW_LABEL in pipe.tumors and 130 not in pipe.tumors


def test_new_controlnet_from_the_unet(train_controlnet, latents, tmp_path):
    options = ["--controlnet_model_name_or_path", "unet", "--max_train_steps", 1, "--learning_rate", 1e-9]
    run(train_controlnet, *on_latents(latents, tmp_path / "output", *options))
    weights = load_file(tmp_path / "output" / WEIGHTS)
    unet = load_file(latents / "base" / "unet" / WEIGHTS)
    assert torch.allclose(weights["conv_in.weight"], unet["conv_in.weight"], atol=1e-6)
    assert weights["controlnet_mid_block.weight"].abs().max() < 1e-6


def test_gradient_checkpointing_changes_nothing_but_memory(train_controlnet, latents, finetuned, tmp_path):
    run(train_controlnet, *on_latents(latents, tmp_path, "--gradient_checkpointing", "--max_train_steps", 5))
    losses, expected = ([line["loss"] for line in read_log(folder / "log.jsonl")] for folder in (tmp_path, finetuned))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_half_precision(train_controlnet, latents, finetuned, tmp_path):
    """The frozen UNet in bfloat16, the ControlNet's weights in float32."""
    options = ["--mixed_precision", "bf16", "--max_train_steps", 5, "--validation_steps", 5]
    run(train_controlnet, *on_latents(latents, tmp_path, *options))
    log, expected = read_log(tmp_path / "log.jsonl"), read_log(finetuned / "log.jsonl")
    losses = [[line["loss"] for line in lines[:5]] for lines in (log, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    assert "validation_loss" in log[5] and len(list(tmp_path.rglob("*.png"))) == 2
    assert {weight.dtype for weight in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_ddpm(train_controlnet, tmp_path):
    data = make_latents(tmp_path / "data", "ddpm-ct")
    options = ["--use_region_contrastive_loss", "--max_train_steps", 2]
    run(train_controlnet, *on_latents(data, tmp_path / "output", *options))
    log = read_log(tmp_path / "output" / "log.jsonl")
    assert [line.keys() - {"step"} for line in log] == [{"loss", "reconstruction_loss", "region_contrastive_loss"}] * 2
    assert all(0 < line["loss"] < 10 for line in log)


def test_from_a_published_checkpoint(train_controlnet, latents, published, tmp_path):
    """With `--version`, in place of a diffusers repository."""
    base = ["--pretrained_model_name_or_path", published, "--version", "rflow-ct"]
    run(train_controlnet, *on_latents(latents, tmp_path, *base, "--max_train_steps", 1, "--learning_rate", 1e-9))
    weights = load_file(tmp_path / WEIGHTS)
    pipe = MaisiCTPipeline.from_maisi_checkpoint(published, version="rflow-ct")
    assert all(
        torch.allclose(weight, weights[name], atol=1e-7) for name, weight in pipe.controlnet.state_dict().items()
    )


# Averages


def test_averages_are_saved(train_controlnet, latents, base_weights, tmp_path):
    """The saved weights are the running averages of those that are trained."""
    options = ["--use_ema", "--ema_decay", 0.2, "--max_train_steps", 4, "--checkpointing_steps", 1]
    run(train_controlnet, *on_latents(latents, tmp_path, *options))
    names = ["conv_in.weight", "controlnet_mid_block.bias", "controlnet_cond_embedding.conv_in.weight"]
    # The decay rises to the one that is asked for.
    averages, decays = {}, [0, 2 / 11, 0.2, 0.2]
    for step, decay in enumerate(decays, start=1):
        trained = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        saved = load_file(tmp_path / f"checkpoint-{step}" / "controlnet" / WEIGHTS)
        for name in names:
            averages[name] = decay * averages.get(name, 0) + (1 - decay) * trained[name]
            assert torch.allclose(saved[name], averages[name], atol=1e-7), (step, name)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["conv_in.weight"], saved["conv_in.weight"])
    assert (saved["conv_in.weight"] - trained["conv_in.weight"]).abs().max() > 1e-5


# Adapters


def test_only_the_adapter_is_trained(adapter, base_weights):
    state = load_file(adapter / "checkpoint-2" / "model.safetensors")
    frozen = {name.replace(".base_layer", ""): weight for name, weight in state.items() if ".lora_" not in name}
    assert frozen.keys() == base_weights.keys()
    assert all(torch.equal(weight, base_weights[name]) for name, weight in frozen.items())
    trained = {name: weight for name, weight in state.items() if ".lora_B." in name}
    assert trained and all(weight.any() for weight in trained.values())  # they start at zero
    assert any("controlnet_cond_embedding" in name for name in trained) and any("to_q" in name for name in trained)


def test_adapter_is_small(adapter, finetuned):
    assert {path.name for path in adapter.iterdir() if path.is_file()} == {
        *("README.md", "args.json", "config.json", "log.jsonl", ADAPTER)
    }
    with safe_open(adapter / ADAPTER, "pt") as file:
        assert all(".lora_" in name for name in file.keys())
    assert size_of(adapter) < size_of(finetuned) / 10


def test_adapter_in_a_pipeline(latents, adapter):
    """It gives what the network gives that was trained."""
    pipe = load_pipeline(latents)
    before = make_image(pipe)
    pipe.load_lora_weights(adapter)
    after = make_image(pipe)
    assert np.abs(after - before).mean() > 0.01
    assert pipe.vocabulary[NEW_CLASS] == NEW_LABEL
    assert pipe.tumors[NEW_LABEL] == tuple(pipe.vocabulary[organ] for organ in ORGANS)

    trained = load_pipeline(latents)
    with safe_open(adapter / ADAPTER, "pt") as file:
        targets = {name.split(".lora_")[0] for name in file.keys()}
    trained.controlnet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=sorted(targets)))
    trained.controlnet.load_state_dict(load_file(adapter / "checkpoint-2" / "model.safetensors"))
    assert np.array_equal(make_image(trained), after)

    pipe.controlnet.disable_adapters()
    assert np.array_equal(make_image(pipe), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--use_lora", "--rank", 3], "size mismatch"), ([*LORA, "--use_ema"], "ema.safetensors"), ([], "Missing key")],
)
def test_adapter_resumed_with_other_options(train_controlnet, latents, adapter, options, says):
    options = [*options, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"]
    message = error_of(train_controlnet, *on_latents(latents, adapter, *options))
    assert f"{adapter / 'checkpoint-2'} is not of a run with these options" in message and says in message
    assert f"give those that {adapter / 'args.json'} has" in message
    assert json.loads((adapter / "args.json").read_text())["rank"] == 2


def test_averaged_adapter(train_controlnet, latents, tmp_path):
    options = [*LORA, "--use_ema", "--ema_decay", 0.5, "--max_train_steps", 3, "--checkpointing_steps", 3]
    run(train_controlnet, *on_latents(latents, tmp_path, *options))
    state, saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors"), load_file(tmp_path / ADAPTER)
    name = "controlnet_cond_embedding.conv_in.lora_B"
    trained = state[f"{name}.default.weight"]
    assert saved[f"{name}.weight"].shape == trained.shape and saved[f"{name}.weight"].any()
    assert not torch.equal(saved[f"{name}.weight"], trained)


# Losses that are not finite


def test_learning_rate_far_too_high(train_controlnet, latents, tmp_path):
    options = ["--learning_rate", 1e30, "--train_batch_size", 2, "--max_train_steps", 6, "--checkpointing_steps", 1]
    message = error_of(train_controlnet, *on_latents(latents, tmp_path, *options))
    assert "step 2: the loss is inf, with" in message or "step 2: the loss is nan, with" in message
    assert message.count("_emb.nii.gz") == 2 and "try a lower --learning_rate" in message
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-1'}" in message
    assert [checkpoint.name for checkpoint in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    for file in tmp_path.rglob("*.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(file).values()), file
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]
    assert not (tmp_path / WEIGHTS).exists()


@pytest.fixture
def broken(latents, tmp_path):
    """A data set whose second latent has this value alone."""

    def make(value):
        data = shutil.copytree(latents, tmp_path / "data")
        save_latent(data / "case-1_emb.nii.gz", np.full((6, 4, 8, 4), value, dtype=np.float32))
        return data

    return make


@pytest.mark.parametrize("num_workers", [0, 1])
def test_latent_with_nan(train_controlnet, broken, tmp_path, num_workers):
    data = broken(np.nan)
    message = error_of(
        train_controlnet, *on_latents(data, tmp_path / "output", "--dataloader_num_workers", num_workers)
    )
    assert message == f"error: '{data / 'case-1_emb.nii.gz'}' has NaN or infinite values; encode it again."


def test_latent_of_huge_values(train_controlnet, broken, tmp_path):
    data = broken(1e38)
    message = error_of(train_controlnet, *on_latents(data, tmp_path / "output", "--max_train_steps", 6))
    assert "the loss is inf, with" in message or "the loss is nan, with" in message
    assert message.count("_emb.nii.gz") == 1 and f"{data / 'case-1_emb.nii.gz'}; there is no checkpoint yet" in message


def test_gradient_that_is_not_finite(train_controlnet, latents, base_weights, tmp_path, monkeypatch):
    """The loss is, and no weight has changed yet."""
    load_controlnet = train_controlnet.load_controlnet
    loaded = []

    def with_broken_gradient(*args):
        loaded.append(load_controlnet(*args))
        loaded[0].conv_in.bias.register_hook(lambda gradient: gradient * torch.inf)
        return loaded[0]

    monkeypatch.setattr(train_controlnet, "load_controlnet", with_broken_gradient)
    message = error_of(train_controlnet, *on_latents(latents, tmp_path, "--max_train_steps", 1))
    assert "step 1: the norm of the gradients is " in message and message.count("_emb.nii.gz") == 1
    assert all(torch.equal(weight, base_weights[name]) for name, weight in loaded[0].state_dict().items())


def test_error_of_the_command(latents, tmp_path):
    """One line on stderr after the bars, exit code 1."""
    arguments = on_latents(latents, tmp_path, "--learning_rate", 1e30, "--max_train_steps", 4)
    command = [sys.executable, SCRIPTS / "train_controlnet.py", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == "" and "Traceback" not in ended.stderr
    (message,) = (line for line in ended.stderr.splitlines() if line and "it/s" not in line)
    assert message.startswith("error: step 2: the loss is ") and message.endswith("--max_grad_norm 1")
