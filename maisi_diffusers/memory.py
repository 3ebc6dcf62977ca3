"""Memory of a device: how much is free, and whether it was too little."""

import os
import tempfile
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU no more than the container or the job may still take."""
    if device.type == "cpu":
        return min(psutil.virtual_memory().available, free_in_group())
    # What torch has reserved and does not use is not free for others, but for us.
    idle = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + idle


def free_in_group() -> float:
    """Bytes that the control group of this process (Linux, v2; of a container or a job) may still take; infinity where
    it has no limit."""
    try:
        (own,) = (line for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, ValueError):  # another system, or v1
        return float("inf")
    free, group = float("inf"), CGROUP / own.removeprefix("0::").lstrip("/")
    for folder in (group, *group.parents):
        try:
            limit, taken = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            files = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:  # the root has none
            continue
        if limit != "max":  # what it has read of files and could forget is free
            free = min(free, int(limit) - int(taken) + int(files.get("inactive_file", 0)))
    return max(free, 0)


def scratch_folder() -> str:
    """Where large temporary files go: the system's folder for these, but not one that is itself in memory, where there
    is another (/var/tmp) and none was named ($TMPDIR)."""
    folder, other = tempfile.gettempdir(), "/var/tmp"
    is_named = "TMPDIR" in os.environ
    if not is_named and is_in_memory(folder) and os.path.isdir(other) and not is_in_memory(other):
        return other
    return folder


def is_in_memory(folder: str | os.PathLike) -> bool:
    """Whether files there take memory and no disk (tmpfs)."""
    kinds = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    folder = Path(folder).resolve()
    return next((kinds[str(path)] for path in (folder, *folder.parents) if str(path) in kinds), "") == "tmpfs"


def usable_memory(device: torch.device) -> int:
    """Bytes of it to plan with; the rest is for what else needs some."""
    return int(0.8 * free_memory(device))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says so; on the CPU and on MPS torch has no class of its own for it."""
    said = any(words in str(error) for words in ("can't allocate memory", "out of memory"))
    return isinstance(error, torch.OutOfMemoryError) or said
