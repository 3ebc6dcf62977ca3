"""What counts as too little memory."""

import tempfile
from types import SimpleNamespace

import psutil
import pytest
import torch

from maisi_diffusers import memory
from maisi_diffusers.memory import free_in_group, free_memory, is_out_of_memory, scratch_folder, usable_memory


def test_free_memory():
    free = free_memory(torch.device("cpu"))
    assert 0 < usable_memory(torch.device("cpu")) < free < 2**50


@pytest.mark.parametrize("limits, free", [(("max", "max"), None), (("9000", "max"), 6500), (("9000", "5000"), 2500)])
def test_limit_of_a_container(limits, free, tmp_path, monkeypatch):
    """The least of its group's and of those around it; what it could forget is free."""
    folders = [tmp_path / "job" / "step", tmp_path / "job"]
    folders[0].mkdir(parents=True)
    for folder, limit in zip(folders, limits):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 2500\ninactive_file 500\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    own = tmp_path / "cgroup"
    monkeypatch.setattr(memory, "OWN_CGROUP", own)
    own.write_text("0::/job/step\n")
    assert free_in_group() == (float("inf") if free is None else free)
    assert free_memory(torch.device("cpu")) == (
        pytest.approx(psutil.virtual_memory().available, rel=0.5) if free is None else free
    )
    own.write_text("5:memory:/job\n")  # v1
    assert free_in_group() == float("inf")
    own.unlink()
    assert free_in_group() == float("inf")


@pytest.mark.parametrize(
    "kind, tmpdir, is_other", [("ext4", None, False), ("tmpfs", None, True), ("tmpfs", "/tmp", False)]
)
def test_scratch_files_are_not_in_memory(kind, tmpdir, is_other, monkeypatch):
    parts = [SimpleNamespace(mountpoint=place, fstype=fs) for place, fs in (("/", "ext4"), ("/tmp", kind))]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.delenv("TMPDIR", raising=False)
    if tmpdir is not None:
        monkeypatch.setenv("TMPDIR", tmpdir)
    assert scratch_folder() == ("/var/tmp" if is_other else "/tmp")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.5 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_what_says_so(error, expected):
    assert is_out_of_memory(error) == expected


def test_what_the_cpu_says():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
