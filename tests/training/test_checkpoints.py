"""A checkpoint is there as a whole or not at all, whenever the writing of it ends."""

import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maisi_diffusers.training.checkpoints import (
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    set_aside_later,
)
from maisi_diffusers.training.trackers import read_log
from tests.scripts.training_data import error_of, on_latents, run

from .checkpoint_writer import write_checkpoints

FILES = {"model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "network/weights.safetensors"}


@pytest.fixture(scope="module")
def processes():
    """Processes that start at once, as copies of one that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maisi_diffusers.training.checkpoints", "torch._dynamo"])
    return context


def assert_complete(checkpoint):
    """It has every file, and each can be read and is of this step."""
    step = checkpoint_step(checkpoint)
    assert {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} == FILES
    for name in ("model.safetensors", "network/weights.safetensors"):
        assert all((weight == step).all() for weight in load_file(checkpoint / name).values())
    assert torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    assert torch.load(checkpoint / "scheduler.bin", weights_only=True)


def names(folder):
    return [checkpoint.name for checkpoint in list_checkpoints(folder)]


def test_checkpoints(tmp_path):
    write_checkpoints(tmp_path, [2, 4, 10])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]
    for checkpoint in list_checkpoints(tmp_path):
        assert_complete(checkpoint)


def test_total_limit(tmp_path):
    write_checkpoints(tmp_path, [2, 4, 6, 8], total_limit=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6", "checkpoint-8"]


def test_find(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None and find_checkpoint(tmp_path / "missing", "latest") is None
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11", "checkpoint-12.removed", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    for name in ("checkpoint-9", str(tmp_path / "checkpoint-9"), "checkpoint-9/"):
        assert find_checkpoint(tmp_path, name) == tmp_path / "checkpoint-9"
    for name in ("checkpoint-11", "9"):
        message = f"no checkpoint '{name}': it has checkpoint-9, checkpoint-10; give one of them, or 'latest'"
        with pytest.raises(FileNotFoundError, match=message):
            find_checkpoint(tmp_path, name)


def test_find_in_another_folder(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name / "checkpoint-9").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint '.*old/checkpoint-9': it has checkpoint-9"):
        find_checkpoint(tmp_path / "new", str(tmp_path / "old" / "checkpoint-9"))


def test_later_ones_are_set_aside(tmp_path):
    write_checkpoints(tmp_path, [2, 4, 10])
    (tmp_path / "abandoned-10").mkdir()
    set_aside_later(tmp_path, tmp_path / "checkpoint-4")
    assert sorted(os.listdir(tmp_path)) == ["abandoned-10", "checkpoint-2", "checkpoint-4"]
    assert os.listdir(tmp_path / "abandoned-10") and find_checkpoint(tmp_path, "latest").name == "checkpoint-4"


# Kills


@pytest.mark.parametrize(
    ("dies_in", "left"),
    [
        ("model", ["checkpoint-2", "checkpoint-4"]),
        ("publishing", ["checkpoint-2", "checkpoint-4"]),
        ("renaming", ["checkpoint-2", "checkpoint-4"]),
        ("removing", ["checkpoint-4", "checkpoint-6"]),
    ],
)
def test_killed(processes, tmp_path, dies_in, left):
    process = processes.Process(target=write_checkpoints, args=(tmp_path, [2, 4, 6], 2, dies_in))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == left
    for checkpoint in list_checkpoints(tmp_path):
        assert_complete(checkpoint)
    assert len(os.listdir(tmp_path)) == 3  # a torso with another name

    # The next run is not in its way, and clears it.
    write_checkpoints(tmp_path, [6, 8], total_limit=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6", "checkpoint-8"]
    for checkpoint in list_checkpoints(tmp_path):
        assert_complete(checkpoint)


def test_killed_at_random(processes, tmp_path):
    torsos = 0
    for _ in range(20):
        last = max(map(checkpoint_step, list_checkpoints(tmp_path)), default=0)
        started = processes.Event()
        process = processes.Process(target=write_checkpoints, args=(tmp_path, range(last + 1, 9999), 2, None, started))
        process.start()
        assert started.wait(60)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = list_checkpoints(tmp_path)
        assert len(found) <= 3 and (not found or checkpoint_step(found[-1]) >= last)
        for checkpoint in found:
            assert_complete(checkpoint)
        torsos += any(name.startswith(".") for name in os.listdir(tmp_path))
    assert found and torsos  # some were written, and some kills were where it hurts


# A full disk


@contextmanager
def files_up_to(size):
    """No file can grow beyond this number of bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [5_000_000, 9_000_000], ids=["weights", "optimiser"])
def test_full_disk(train_controlnet, latents, tmp_path, size):
    """Too full for the weights, or for the optimiser's state, which is twice as large."""

    def options(steps):
        return ["--lr_scheduler", "constant", "--checkpointing_steps", 1, "--max_train_steps", steps]

    resume = ["--resume_from_checkpoint", "latest"]
    run(train_controlnet, *on_latents(latents, tmp_path, *options(1)))
    with files_up_to(size):
        message = error_of(train_controlnet, *on_latents(latents, tmp_path, *options(2), *resume))
    assert f"checkpoint-2 cannot be written to {str(tmp_path)!r}" in message
    assert "the last complete checkpoint is checkpoint-1: make room, then go on with --resume" in message
    assert names(tmp_path) == ["checkpoint-1"]
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []

    run(train_controlnet, *on_latents(latents, tmp_path, *options(3), *resume))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_full_disk_at_the_first_checkpoint(train_controlnet, latents, tmp_path):
    with files_up_to(5_000_000):
        arguments = on_latents(latents, tmp_path, "--checkpointing_steps", 1, "--max_train_steps", 2)
        assert "; there is none before it: make room" in error_of(train_controlnet, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["args.json", "log.jsonl"]


def test_full_disk_at_the_end(train_controlnet, latents, tmp_path):
    """The last checkpoint is there, and no half of the result."""
    arguments = on_latents(latents, tmp_path, "--max_train_steps", 2)
    with files_up_to(5_000_000):
        assert "large" in error_of(train_controlnet, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["args.json", "log.jsonl"]
    run(train_controlnet, *arguments)
    assert Path(tmp_path, "diffusion_pytorch_model.safetensors").is_file()
