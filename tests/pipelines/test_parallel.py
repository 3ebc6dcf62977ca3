"""Processes that share an image make what one alone makes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pipelines import parallel_driver
from tests.tiny import make_pipeline

NUM_PROCESSES = 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Results of three processes."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_PROCESSES)]
    launch += ["--master-port", str(port), parallel_driver.__file__, str(folder)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.fixture(scope="module")
def alone():
    return parallel_driver.make(is_shared=False)


def test_same_everywhere(shared):
    for name, value in shared[0].items():
        if isinstance(value, torch.Tensor):
            assert all(torch.equal(other[name], value) for other in shared[1:]) or name == "planes", name


def test_same_as_alone(shared, alone):
    for name, value in alone.items():
        found = shared[0][name]
        assert found.shape == value.shape and found.dtype == value.dtype
        tolerance = 2e-2 if "bfloat16" in name else 5e-5
        deviation = (found.float() - value.float()).abs().max() / value.float().abs().max()
        assert deviation <= tolerance, name


def test_each_holds_its_share(shared):
    """Of the finest grid of the image, 56 planes, and those of its neighbours."""
    assert [one["planes"].item() for one in shared] == [16 + 1, 20 + 2, 20 + 1]


def test_errors(shared):
    no_seed, too_many = shared[0]["errors"]
    assert "need the same noise: give generator=" in no_seed
    assert "3 processes cannot share a volume whose coarsest grid has 2 planes" in too_many


def test_no_processes():
    with pytest.raises(ValueError, match=r"accelerate launch or torchrun, and make accelerate.PartialState\(\)"):
        make_pipeline().enable_parallelism()
