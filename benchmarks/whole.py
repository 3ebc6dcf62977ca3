r"""
Seconds and peak memory of a whole CT with its label map, from the label map to HU, side by side with MONAI's networks
doing the same; and how much of the time is spent outside the networks.

    python -m benchmarks.whole
    python -m benchmarks.whole --size 512 512 512 --num_inference_steps 2 --variants "bfloat16 auto"

The published architecture (`rflow-ct`) with random weights. MONAI in float32 is the unit: its networks in the
published loop, which embeds the label map at every step, and its decoder in one piece. With other `--variants` the
first of these is; on a GPU "MONAI autocast" is beside them, in float16 where autocast takes it. Every variant works
once, and on a GPU once before to warm up, in a process of its own.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.imaging import spacing_of
from maisi_diffusers.models import TILINGS
from maisi_diffusers.phantom import make_phantom
from tests.parity.monai_reference import (
    PUBLISHED,
    SCALE_FACTOR,
    build_networks,
    label_bits,
    make_scheduler,
    sample,
)

from . import markdown
from .networks import DTYPES, MONAI, VERSION, on_this_machine, published_checkpoint
from .turns import serve, synchronize, take_turns

FIELD_OF_VIEW = (384.0, 384.0, 320.0)
VARIANTS = ["MONAI", "bfloat16 auto"]


def make_label_map(size: tuple[int, int, int]) -> nib.Nifti1Image:
    """A phantom's, of chest and abdomen; a large one of voxels that are doubled, since to draw 512^3 takes 20 GB, and
    a quarter of a voxel off."""
    times = 1 if max(size) <= 256 else 2
    drawn = tuple(n // times for n in size)
    labels = make_phantom(0, size=drawn, spacing=tuple(mm / n for mm, n in zip(FIELD_OF_VIEW, drawn))).labels
    values = np.asarray(labels.dataobj)
    for axis in range(3):
        values = values.repeat(times, axis)
    return nib.Nifti1Image(values, labels.affine @ np.diag([*[1 / times] * 3, 1]))


def monai_work(size: tuple[int, int, int], steps: int, device: torch.device) -> Callable[[], None]:
    networks = {name: network.to(device) for name, network in build_networks(VERSION, PUBLISHED).items()}
    mask = make_label_map(size)
    labels, spacing = torch.from_numpy(np.asarray(mask.dataobj)), torch.tensor([spacing_of(mask)], device=device) * 100
    class_labels = torch.tensor([1], device=device)

    def work() -> None:
        on_device = labels[None, None].to(device)
        bits = label_bits(on_device)

        def predict(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            shared = {"x": latents, "timesteps": timesteps.to(device), "class_labels": class_labels}
            down, mid = networks["controlnet"](**shared, controlnet_cond=bits)
            return networks["unet"](
                **shared,
                spacing_tensor=spacing,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            )

        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, *(n // 4 for n in size), generator=generator).to(device)
        latents = sample(make_scheduler(VERSION), predict, latents, steps, generator)
        image = networks["vae"].decode(latents / SCALE_FACTOR).clip(0, 1) * 2000 - 1000
        image[on_device == 0] = -1000
        image.cpu()

    return work


def our_work(
    size: tuple[int, int, int], steps: int, settings: list[str], folder: Path, device: torch.device
) -> Callable[[], dict[str, float]]:
    dtype, tiling, *memory = DTYPES[settings[0]], *settings[1:]
    pipe = MaisiCTPipeline.from_maisi_checkpoint(folder, version=VERSION, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    TILINGS[tiling](pipe.vae, *memory)
    mask = make_label_map(size)
    inside = [0.0]
    for part, name in (
        (pipe.unet, "forward"),
        (pipe.controlnet, "forward"),
        (pipe.controlnet, "embed_condition"),
        (pipe.vae, "decode"),
    ):
        setattr(part, name, timed(getattr(part, name), inside, device))

    def work() -> dict[str, float]:
        inside[0], start = 0.0, time.perf_counter()
        pipe(
            mask=mask,
            output_size=size,
            spacing=spacing_of(mask),
            num_inference_steps=steps,
            quality_retries=0,
            generator=torch.Generator().manual_seed(0),
        )
        return {"outside": 1 - inside[0] / (time.perf_counter() - start)}

    return work


def timed(function: Callable, seconds: list[float], device: torch.device) -> Callable:
    """The function, its seconds added to a list of one number."""

    def call(*args, **kwargs):
        synchronize(device)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize(device)
        seconds[0] += time.perf_counter() - start
        return result

    return call


def measure(size: tuple[int, int, int], steps: int, variants: list[str]) -> dict[str, dict[str, float]]:
    """Variant -> seconds, megabytes, and of ours the share of the time outside the networks."""
    with published_checkpoint() as folder:
        command = [
            "-m",
            "benchmarks.whole",
            "--folder",
            folder,
            "--size",
            *size,
            "--num_inference_steps",
            steps,
            "--serve",
        ]
        return take_turns({variant: [*map(str, command), variant] for variant in variants}, repeats=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(256, 256, 128), help="one that the model makes")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--variants", nargs="+", default=on_this_machine(VARIANTS), help='such as "float32 exact 1GB"')
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = tuple(args.size)
    if args.serve is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_grad_enabled(False)
        if args.serve in MONAI:
            serve(MONAI[args.serve](monai_work(size, args.num_inference_steps, device)), device, lambda result: {})
        else:
            work = our_work(size, args.num_inference_steps, args.serve.split(), args.folder, device)
            serve(work, device, lambda told: told)
        return
    print(table(measure(size, args.num_inference_steps, args.variants)))


def table(results: dict[str, dict[str, float]]) -> str:
    """In Markdown; times as fast as the first variant that did not fail."""
    unit, rows = next(filter(None, results.values()), {}), []
    for variant, result in results.items():
        if not result:
            rows.append([variant, "failed", *[""] * 3])
            continue
        numbers = (
            f"{result['seconds']:.1f}",
            f"{unit['seconds'] / result['seconds']:.2f}",
            f"{result['megabytes']:.0f}",
        )
        rows.append([variant, *numbers, f"{result['outside']:.1%}" if "outside" in result else ""])
    return markdown.table(["variant", "seconds", "times as fast", "peak MB", "outside the networks"], rows)


if __name__ == "__main__":
    main()
