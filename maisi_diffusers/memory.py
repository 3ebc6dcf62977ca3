"""Memory of a device: how much is free, and whether it was too little."""

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return torch.accelerator.get_memory_info(device)[0]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says so; on the CPU torch has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
