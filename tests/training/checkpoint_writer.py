"""A process that writes checkpoints, and may die of it. Apart from the tests, so that it is quick to start."""

import os
import signal
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from maisi_diffusers import files
from maisi_diffusers.training import checkpoints
from maisi_diffusers.training.checkpoints import save_checkpoint


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(path, ignore_errors=False):
    """As `shutil.rmtree`, but not to the end of a folder that is there."""
    for file in path.glob("*.bin"):
        file.unlink()
        die()


def write_checkpoints(folder, steps, total_limit=None, dies_in=None, started=None):
    """
    Write the checkpoints of a network whose weights are all the number of steps.

    Args:
        folder: of the run.
        steps: of the checkpoints.
        total_limit: checkpoints to keep.
        dies_in: where the last one kills this process.
        started: an event that is set before the first.
    """
    network = torch.nn.Linear(64, 64)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    accelerator = Accelerator(cpu=True)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    network(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    if started is not None:
        started.set()
    for step in steps:
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, step)

        def save_model(checkpoint, is_last=step == steps[-1]):
            (checkpoint / "network").mkdir()
            if is_last and dies_in == "model":
                die()
            save_file(network.state_dict(), checkpoint / "network" / "weights.safetensors")

        place = {
            "publishing": (checkpoints, "publish", die),
            "renaming": (files.os, "replace", die),
            "removing": (files.shutil, "rmtree", die_half_way),
        }.get(dies_in)
        if place is None or step != steps[-1]:
            save_checkpoint(accelerator, folder, step, save_model, total_limit)
        else:
            with mock.patch.object(*place):
                save_checkpoint(accelerator, folder, step, save_model, total_limit)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
