"""Where a model runs and in which precision."""

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """
    The device of a name, such as "cuda:1"; "auto" is the machine's accelerator (cuda, mps, xpu, ...) or else the CPU.

    Raises:
        ValueError: for a name that is none, and for a device that is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not known: use auto, cpu, cuda, mps or xpu") from error
    if device.type == "cpu":
        return device
    if accelerator is None or device.type != accelerator.type:
        there = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise ValueError(f"--device {name} is not there, this machine has {there}: use one of these, or auto")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise ValueError(
            f"--device {name} is not there, this machine has {count}: use {device.type}:0 to :{count - 1}"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is float32 on a CPU, which is slow at the others, and float16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return DTYPES[name]
