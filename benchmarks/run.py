r"""
What is said of speed and memory, measured in one run beside MONAI, and written to docs/performance.md and .png.

    python -m benchmarks.run
    python -m benchmarks.run --only networks whole

On two CPU cores it takes about two hours. On a GPU it runs as it is, and makes a volume of 512 x 512 x 512 voxels too.
What a part has measured is kept in docs/performance.json; `--only` measures some parts anew and leaves the others.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline

from . import networks, solvers, whole
from .page import write_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
BOUNDS = ("512MiB", "1GiB", "2GiB")


def measure_networks() -> dict:
    return {work: networks.measure(work, *of_work, repeats=2) for work, of_work in networks.WORK.items()}


def measure_tiling() -> dict:
    """One piece against slabs in several bounds, of latents of 48^3 and 64^3 voxels."""
    variants = ["float32 off", *(f"float32 exact {bound}" for bound in BOUNDS), "float32 lean 1GiB"]
    return {str(size): networks.measure("decode", size, variants, repeats=0) for size in (48, 64)}


def measure_whole() -> dict:
    return whole.measure((256, 256, 128), 30, whole.VARIANTS)


def measure_large() -> dict:
    """On a GPU alone: on a CPU it takes hours."""
    return whole.measure((512, 512, 512), 30, ["bfloat16 auto"]) if torch.cuda.is_available() else {}


def measure_solvers() -> dict:
    pipe = MaisiCTPipeline.from_pretrained(PHANTOM_TINY)
    pipe.set_progress_bar_config(disable=True)
    return solvers.measure(pipe, size=64, seeds=[0, 1])


PARTS: dict[str, Callable[[], dict]] = {
    "networks": measure_networks,
    "tiling": measure_tiling,
    "whole": measure_whole,
    "large": measure_large,
    "solvers": measure_solvers,
}


def machine() -> str:
    """What is measured on."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores} CPU cores, {memory:.0f} GiB{gpu}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to measure")
    args = parser.parse_args()
    kept = DOCS / "performance.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in args.only:
        print(f"measuring {name}", flush=True)
        results[name] = {"machine": machine(), "measured": PARTS[name]()}
        kept.write_text(json.dumps(results, indent=1) + "\n")
        write_page(results, DOCS)


if __name__ == "__main__":
    main()
