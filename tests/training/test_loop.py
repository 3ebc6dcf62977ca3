"""A run that is killed goes on as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from maisi_diffusers.training.checkpoints import checkpoint_step, list_checkpoints
from maisi_diffusers.training.trackers import read_log
from tests.scripts.training_data import SCRIPTS, error_of, interrupt, on_latents, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
NUM_STEPS = 12
# Six cases in batches of two and two batches a step: the second step of every epoch has one batch alone.
OPTIONS = ["--max_train_steps", NUM_STEPS, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
# Every other checkpoint is in the middle of an epoch.
OPTIONS += ["--use_ema", "--checkpointing_steps", 3, "--checkpoints_total_limit", 2]


@pytest.fixture(scope="module")
def uninterrupted(train_controlnet, latents, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    run(train_controlnet, *on_latents(latents, output, *OPTIONS))
    return output


def kill_at_step(step, arguments, output):
    """Start the script, and kill it as soon as its log has the step."""
    command = [sys.executable, SCRIPTS / "train_controlnet.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and all(line["step"] < step for line in read_log(output / "log.jsonl")):
        time.sleep(0.005)
    process.kill()
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()


def assert_same_run(output, expected):
    """Bit for bit the same weights, state and log."""
    assert (output / "log.jsonl").read_text() == (expected / "log.jsonl").read_text()
    assert [path.name for path in list_checkpoints(output)] == [path.name for path in list_checkpoints(expected)]
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert len(files) == 1 + 2 * 3  # weights; two checkpoints with weights, averages, and averages to use
    for file in files:
        ours, theirs = load_file(output / file), load_file(expected / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), file
    for file in ("optimizer.bin", "scheduler.bin"):
        paths = [list_checkpoints(folder)[-1] / file for folder in (output, expected)]
        ours, theirs = (torch.load(path, weights_only=True) for path in paths)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_killed_at_random(train_controlnet, latents, uninterrupted, tmp_path):
    """Twice, by SIGKILL; and the end in yet another process."""
    arguments = on_latents(latents, tmp_path, *OPTIONS, "--resume_from_checkpoint", "latest")
    for low, high in ((4, 7), (8, 10)):
        step = random.randint(low, high)
        print(f"killed at step {step}")
        kill_at_step(step, arguments, tmp_path)
        behind = list_checkpoints(tmp_path)
        assert behind and step - 4 < checkpoint_step(behind[-1]) and not (tmp_path / WEIGHTS).exists()
    run(train_controlnet, *arguments)
    assert_same_run(tmp_path, uninterrupted)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".checkpoint")] == []


@pytest.mark.parametrize("batches", [6, 10])
def test_interrupted_anywhere(train_controlnet, latents, uninterrupted, tmp_path, batches):
    """At the end of an epoch, behind a checkpoint in its middle; between two batches of a step."""
    arguments = on_latents(latents, tmp_path, *OPTIONS, "--resume_from_checkpoint", "latest")
    interrupt(train_controlnet, batches, *arguments)
    run(train_controlnet, *arguments)
    assert_same_run(tmp_path, uninterrupted)


def test_resumed_when_complete(train_controlnet, latents, uninterrupted, caplog):
    """Nothing is trained, the same is saved, and nobody is warned."""
    files = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    with caplog.at_level("WARNING", "maisi_diffusers"):
        arguments = on_latents(latents, uninterrupted, *OPTIONS, "--resume_from_checkpoint", f"checkpoint-{NUM_STEPS}")
        run(train_controlnet, *arguments)
    assert not caplog.records
    changed = {path.name for path, content in files.items() if path.read_bytes() != content}
    assert changed == {"args.json"}  # it says how it was resumed
    assert {path for path in uninterrupted.rglob("*") if path.is_file()} == set(files)


def test_resumed_from_an_earlier_checkpoint(train_controlnet, latents, uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted, tmp_path / "output")
    for path in (output / WEIGHTS, output / "checkpoint-12" / "model.safetensors"):
        path.write_bytes(b"to be written again")
    run(train_controlnet, *on_latents(latents, output, *OPTIONS, "--resume_from_checkpoint", "checkpoint-9"))
    assert_same_run(output, uninterrupted)
    assert (output / "abandoned-12").is_dir()


def test_workers_do_not_matter(train_controlnet, latents, uninterrupted, tmp_path):
    run(train_controlnet, *on_latents(latents, tmp_path, *OPTIONS, "--dataloader_num_workers", 2))
    assert_same_run(tmp_path, uninterrupted)


def test_resumed_with_other_batches(train_controlnet, latents, tmp_path, caplog):
    options = ["--max_train_steps", 1, "--checkpointing_steps", 1]
    run(train_controlnet, *on_latents(latents, tmp_path, *options))
    options = ["--max_train_steps", 2, "--train_batch_size", 2, "--resume_from_checkpoint", "latest"]
    with caplog.at_level("WARNING", "maisi_diffusers"):
        run(train_controlnet, *on_latents(latents, tmp_path, *options))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "train_batch_size was 1 and is 2: the run goes on with other batches" in messages[0]
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_the_optimiser_is_as_the_command_says(train_controlnet, latents, tmp_path):
    """A run that goes on with another learning rate has it at once: here hardly a step, then a large one."""
    options = ["--checkpointing_steps", 1, "--lr_scheduler", "constant", "--adam_weight_decay", 0]
    run(train_controlnet, *on_latents(latents, tmp_path, *options, "--max_train_steps", 1))
    before = load_file(tmp_path / WEIGHTS)
    resumed = ["--resume_from_checkpoint", "latest", "--learning_rate", 1e-12]
    run(train_controlnet, *on_latents(latents, tmp_path, *options, "--max_train_steps", 2, *resumed))
    after = load_file(tmp_path / WEIGHTS)
    assert max((weight - after[name]).abs().max() for name, weight in before.items()) < 1e-6
    resumed = ["--resume_from_checkpoint", "latest", "--learning_rate", 1e-3, "--adam_beta1", 0.5]
    run(train_controlnet, *on_latents(latents, tmp_path, *options, "--max_train_steps", 3, *resumed))
    after = load_file(tmp_path / WEIGHTS)
    assert max((weight - after[name]).abs().max() for name, weight in before.items()) > 5e-4
    (group,) = torch.load(tmp_path / "checkpoint-3" / "optimizer.bin", weights_only=True)["param_groups"]
    assert (group["lr"], group["initial_lr"], tuple(group["betas"])) == (1e-3, 1e-3, (0.5, 0.999))


def test_averages_are_not_dropped(train_controlnet, latents, uninterrupted):
    options = [option for option in OPTIONS if option != "--use_ema"]
    arguments = on_latents(latents, uninterrupted, *options, "--resume_from_checkpoint", "latest")
    assert "has averaged weights, which would be lost: add --use_ema" in error_of(train_controlnet, *arguments)


def test_checkpoints_of_another_run(train_controlnet, latents, uninterrupted):
    files = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    message = error_of(train_controlnet, *on_latents(latents, uninterrupted, *OPTIONS))
    assert f"output_dir={str(uninterrupted)!r} has checkpoints of another run" in message
    assert "add --resume_from_checkpoint latest to go on with it, or give another folder" in message
    options = [*OPTIONS, "--resume_from_checkpoint", "checkpoint-7"]
    message = error_of(train_controlnet, *on_latents(latents, uninterrupted, *options))
    assert "no checkpoint 'checkpoint-7': it has checkpoint-9, checkpoint-12; give one of them" in message
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == files


def test_token_is_not_written_down(train_controlnet, latents, tmp_path):
    run(train_controlnet, *on_latents(latents, tmp_path, "--hub_token", "hf_secret", "--max_train_steps", 1))
    assert "seed" in json.loads((tmp_path / "args.json").read_text())
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_accumulated_batches_are_one_large_batch(train_controlnet, latents, tmp_path):
    options = ["--max_train_steps", 6, "--weighted_loss", 10]
    batches = {
        "large": ["--train_batch_size", 2],
        "accumulated": ["--gradient_accumulation_steps", 2],
        "small": [],
    }
    for name, chosen in batches.items():
        run(train_controlnet, *on_latents(latents, tmp_path / name, *options, *chosen))
    losses = {name: [line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in batches}
    assert losses["accumulated"] == pytest.approx(losses["large"], abs=1e-5)
    assert losses["small"] != pytest.approx(losses["large"], abs=1e-2)
    # In the mean: Adam turns the rounding of a gradient near zero into a whole step of a single weight.
    weights = {
        name: torch.cat([weight.flatten() for weight in load_file(tmp_path / name / WEIGHTS).values()])
        for name in batches
    }
    assert (weights["accumulated"] - weights["large"]).abs().mean() < 1e-5
    assert (weights["small"] - weights["large"]).abs().mean() > 1e-4


def test_epochs(train_controlnet, latents, tmp_path):
    """Without a number of steps, as many as the epochs have."""
    options = ["--num_train_epochs", 2, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    run(train_controlnet, *on_latents(latents, tmp_path, *options))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
