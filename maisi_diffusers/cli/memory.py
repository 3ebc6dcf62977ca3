"""How much memory an image needs in the ways there are to make it, and what there is."""

from ..memory import free_memory, usable_memory
from ..pipelines import MaisiCTPipeline
from ..pipelines.memory_plan import plan_memory
from .devices import DTYPES, pick_device

# Python with torch and diffusers.
PROGRAM = 500e6


def describe_memory(pipe: MaisiCTPipeline, size: tuple[int, int, int]) -> dict:
    """
    What making one image takes, with 32 and with 16 bits.

    Args:
        pipe: with or without its weights.
        size: of the image, in voxels.

    Returns:
        as JSON has it: `device`, its `free` bytes and those `usable` to plan with, and for each dtype the `stages` of
        [`plan_memory`] and bytes in all for each of the `modes`, weights and program among them.
    """
    device, plans = pick_device("auto"), {}
    for name in ("float32", "bfloat16"):
        stages = plan_memory(pipe, size, DTYPES[name], device)
        other = max(
            n for stage, n in stages.items() if stage != "weights" and not stage.startswith(("decode", "kept"))
        )
        decoding = {"off": stages["decode off"]}
        for tiling in ("exact", "lean"):
            decoding[tiling] = stages[f"decode {tiling}"]
            decoding[f"{tiling}, scratch file"] = stages[f"decode {tiling}"] - stages[f"kept {tiling}"]
        base = stages["weights"] + (PROGRAM if device.type == "cpu" else 0)
        plans[name] = {"stages": stages, "modes": {mode: round(base + max(other, n)) for mode, n in decoding.items()}}
    memory = {"free": free_memory(device), "usable": usable_memory(device)}
    return {"output_size": list(size), "device": str(device), **memory, "plans": plans}
