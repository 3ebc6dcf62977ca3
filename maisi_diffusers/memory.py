"""Memory of a device: how much is free, and whether it was too little."""

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    # What torch has reserved and does not use is not free for others, but for us.
    idle = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return torch.accelerator.get_memory_info(device)[0] + idle


def usable_memory(device: torch.device) -> int:
    """Bytes of it to plan with; the rest is for what else needs some."""
    return int(0.8 * free_memory(device))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says so; on the CPU and on MPS torch has no class of its own for it."""
    said = any(words in str(error) for words in ("can't allocate memory", "out of memory"))
    return isinstance(error, torch.OutOfMemoryError) or said
