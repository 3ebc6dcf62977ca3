r"""
What is said of speed and memory, measured in one run beside MONAI, and written to docs/performance.md and .png.

    python -m benchmarks.run
    python -m benchmarks.run --only networks whole
    python -m benchmarks.run --output docs/performance_gpu

On two CPU cores it takes one to three hours, by their speed. On a GPU it runs as it is. A variant that fails, as one
piece of a large volume does for want of memory, is told as failed. What each part has measured is kept beside the
page, in `performance.json`; `--only` measures some parts anew, from their beginning, and leaves the others. If
anything on the page does not hold, it says so at the end and exits with 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

import maisi_diffusers
from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline

from . import networks, solvers, whole
from .page import write_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
BOUNDS = ("2GiB", "1GiB", "512MiB")


def measure_networks() -> Iterator[dict]:
    measured = {}
    with networks.published_checkpoint() as folder:
        for work, (size, repeats, variants) in networks.WORK.items():
            variants = networks.on_this_machine(variants)
            measured[work] = networks.measure(folder, work, size, variants, repeats)
            yield measured


def measure_tiling() -> Iterator[dict]:
    """One piece against slabs in several bounds, of a latent of 48^3 voxels; of one of 64^3, whose one piece takes 30
    GB, the loosest bound against the others."""
    bounds, measured = [f"float32 exact {bound}" for bound in BOUNDS], {}
    with networks.published_checkpoint() as folder:
        for size, variants in ((48, ["float32 off", *bounds, "float32 lean 1GiB"]), (64, bounds)):
            measured[str(size)] = networks.measure(folder, "decode", size, variants, repeats=0)
            yield measured


def measure_whole() -> Iterator[dict]:
    yield whole.measure((256, 256, 128), 30, networks.on_this_machine(whole.VARIANTS))


def measure_large() -> Iterator[dict]:
    """In 30 steps on a GPU; in 2 on a CPU, and with a bound that a laptop has room for."""
    variant, steps = ("bfloat16 auto", 30) if torch.cuda.is_available() else ("bfloat16 exact 6GiB", 2)
    yield {f"{variant}, {steps} steps": whole.measure((512, 512, 512), steps, [variant])[variant]}


def measure_solvers() -> Iterator[dict]:
    pipe = MaisiCTPipeline.from_pretrained(PHANTOM_TINY)
    pipe.set_progress_bar_config(disable=True)
    yield solvers.measure(pipe, size=64, seeds=[0, 1])


# Of each what it has measured, told again whenever that has become more.
PARTS: dict[str, Callable[[], Iterator[dict]]] = {
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
    if gpu and torch.backends.cudnn.allow_tf32:
        gpu += " (convolutions of float32 in TF32)"
    return (
        f"{cores} CPU cores ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, "
        f"{memory:.0f} GiB{gpu}, torch {torch.__version__}, maisi-diffusers {maisi_diffusers.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to measure")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the page (default: docs)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "performance.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in args.only:
        print(f"measuring {name}", flush=True)
        for measured in PARTS[name]():
            results[name] = {"machine": machine(), "on_gpu": torch.cuda.is_available(), "measured": measured}
            results = {part: results[part] for part in PARTS if part in results}  # the order of the page
            kept.write_text(json.dumps(results, indent=1) + "\n")
            broken = write_page(results, args.output)
    if broken:
        sys.exit("\n".join([f"{args.output / 'performance.md'} has rows that do not hold:", *broken]))


if __name__ == "__main__":
    main()
