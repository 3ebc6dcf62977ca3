r"""
Seconds, peak memory and deviation of the networks of the published architecture (`rflow-ct`), side by side with
MONAI's of the same random weights.

    python -m benchmarks.networks
    python -m benchmarks.networks --work decode --size 48 --repeats 0 --variants "float32 off" "float32 exact 1GB"

MONAI's networks in float32 are the unit; with other `--variants` the first of these is. On a GPU "MONAI autocast" is
beside them: in float16 where autocast takes it, as MAISI's published scripts run. Every variant runs in a process of
its own, so that its memory is its own, and they take turns, so that what else the machine does is shared by all;
ratios are those of the fastest times. Memory is what the work adds to the process at its highest. The deviation is the
largest from the first's result. A variant is a dtype, a way to tile, maybe its memory, and maybe what it goes without:
"float32 auto without winograd".
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.anatomy import label_bits
from maisi_diffusers.models import TILINGS, controlnet_maisi, slab_convolution, upsample_conv_maisi
from maisi_diffusers.models.conv_maisi import MaisiConv3d
from maisi_diffusers.models.modeling_maisi import MaisiModelMixin
from tests.parity.monai_reference import PUBLISHED, build_networks, network_config, save_checkpoint

from . import markdown
from .turns import serve, take_turns

VERSION = "rflow-ct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Variant -> how MONAI's work is called.
MONAI = {"MONAI": lambda work: work, "MONAI autocast": lambda work: torch.autocast("cuda", torch.float16)(work)}
# What is done on a CPU alone; a GPU's convolutions are cuDNN's.
CPU_ALONE = tuple(f"without {one}" for one in ("parts", "winograd", "phases", "onednn", "layout"))
# Of a cube: edge of the latent in voxels; how often each variant works; variants.
WORK = {
    "embedding": (32, 6, ["MONAI", "float32 off", "bfloat16 off", "float32 off without layout"]),
    "doubling": (
        32,
        20,
        ["MONAI", *(f"{dtype} off{without}" for dtype in DTYPES for without in ("", " without phases"))],
    ),
    "step": (
        32,
        6,
        [
            *("MONAI", "float32 off", "bfloat16 off"),
            *("float32 off without embedding", "float32 off without onednn", "bfloat16 off without layout"),
        ],
    ),
    "decode": (
        24,
        2,
        [
            *("MONAI", "float32 auto", "bfloat16 auto", "float32 off", "bfloat16 off", "float32 exact 256MiB"),
            *("float32 auto without winograd", "bfloat16 auto without winograd", "float32 auto without parts"),
        ],
    ),
    "encode": (
        24,
        2,
        [
            *("MONAI", "float32 auto", "bfloat16 auto", "float32 off", "bfloat16 off", "float32 exact 256MiB"),
            *("float32 auto without winograd", "bfloat16 auto without winograd"),
        ],
    ),
    "guidance": (32, 4, [f"{dtype} off{without}" for dtype in DTYPES for without in ("", " without turns")]),
}

# Of a pipeline what the work is of: the rest is let go, or the processes of all variants together have no room.
NETWORKS = {
    "embedding": ["controlnet"],
    "doubling": ["unet"],
    "step": ["unet", "controlnet"],
    "decode": ["vae"],
    "encode": ["vae"],
    "guidance": ["unet", "controlnet"],
}

# What can be switched off, besides that a label map is embedded once for all steps, and that the two predictions of a
# guided step are made in turns.
SWITCHES = {
    "parts": lambda: setattr(slab_convolution, "CPU_SLAB", sys.maxsize),
    "winograd": lambda: slab_convolution.WINOGRAD_CHANNELS.clear(),
    "phases": lambda: setattr(upsample_conv_maisi, "VOXELS_PER_CHANNEL", math.inf),
    "onednn": lambda: setattr(MaisiConv3d, "is_better_by_onednn", lambda conv, hidden_states: False),
    "layout": lambda: (
        setattr(MaisiModelMixin, "lay_out", lambda network, device: None),
        setattr(controlnet_maisi, "SIDE_BY_SIDE_ON", ()),
    ),
}


def make_inputs(work: str, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Random inputs, the same for every variant; a label map has no structure."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"latents": torch.randn(1, 4, *[size] * 3, generator=generator).to(dtype)}
    if work == "encode":
        inputs["image"] = torch.rand(1, 1, *[4 * size] * 3, generator=generator).to(dtype)
    if work == "doubling":  # what the UNet doubles last
        inputs["features"] = torch.randn(1, 128, *[size // 2] * 3, generator=generator).to(dtype)
        inputs["temb"] = torch.randn(1, 512, generator=generator).to(dtype)
    if work in ("embedding", "step", "guidance"):
        inputs["labels"] = torch.randint(256, (1, *[4 * size] * 3), generator=generator, dtype=torch.uint8)
        inputs["spacing"] = torch.tensor([[150.0, 150.0, 200.0]], dtype=dtype)
        inputs["timesteps"], inputs["class_labels"] = torch.tensor([500.0]), torch.tensor([1])
    return {name: value.to(device) for name, value in inputs.items()}


def monai_work(work: str, size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """One call of MONAI's networks, in float32; of the step as its published script does it."""
    built = build_networks(VERSION, PUBLISHED)
    networks = {name: built[name].to(device) for name in NETWORKS[work]}
    inputs = make_inputs(work, size, torch.float32, device)
    if work == "embedding":
        return lambda: networks["controlnet"].controlnet_cond_embedding(label_bits(inputs["labels"]))
    if work == "doubling":
        return lambda: networks["unet"].up_blocks[2].upsampler(inputs["features"], inputs["temb"])
    if work == "decode":
        return lambda: networks["vae"].decode(inputs["latents"])
    if work == "encode":
        return lambda: networks["vae"].encode(inputs["image"])[0]

    bits = label_bits(inputs["labels"])

    def step() -> torch.Tensor:
        shared = {"x": inputs["latents"], "timesteps": inputs["timesteps"], "class_labels": inputs["class_labels"]}
        down, mid = networks["controlnet"](**shared, controlnet_cond=bits)
        return networks["unet"](
            **shared,
            spacing_tensor=inputs["spacing"],
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        )

    return step


def our_work(work: str, size: int, variant: str, folder: Path, device: torch.device) -> Callable[[], torch.Tensor]:
    """One call of ours; a step is one of many, for which the label map has been embedded once."""
    settings, _, switched_off = variant.partition(" without ")
    if switched_off in SWITCHES:
        SWITCHES[switched_off]()
    dtype, tiling, *memory = settings.split()
    pipe = MaisiCTPipeline.from_maisi_checkpoint(folder, version=VERSION, torch_dtype=DTYPES[dtype]).to(device)
    TILINGS[tiling](pipe.vae, *memory)
    pipe.register_modules(**{name: None for name in ("vae", "unet", "controlnet") if name not in NETWORKS[work]})
    for network in (getattr(pipe, name) for name in NETWORKS[work]):
        network.lay_out(device)
        for weight in network.parameters():
            weight.sum()  # files are read when they are first touched
    inputs = make_inputs(work, size, DTYPES[dtype], device)
    if work == "decode":
        return lambda: pipe.vae.decode(inputs["latents"]).sample
    if work == "encode":
        return lambda: pipe.vae.encode(inputs["image"]).latent_dist.mode()
    if work == "doubling":
        return lambda: pipe.unet.up_blocks[2].upsamplers[0](inputs["features"], inputs["temb"])
    if work == "embedding":
        return lambda: pipe.controlnet.embed_condition(label_bits(inputs["labels"], dtype=torch.uint8))
    embed = partial(pipe.controlnet.embed_condition, label_bits(inputs["labels"], dtype=torch.uint8))
    conditions = {"class_labels": inputs["class_labels"], "spacing": inputs["spacing"]}

    def step(copies: int, embedding: torch.Tensor) -> torch.Tensor:
        """Of some copies of the inputs."""
        latents, timesteps, *of_conditions, embedding = (
            torch.cat([one] * copies)
            for one in (inputs["latents"], inputs["timesteps"], *conditions.values(), embedding)
        )
        return pipe.predict(latents, timesteps, dict(zip(conditions, of_conditions)), embedding, 1.0)

    if switched_off == "embedding":
        return lambda: step(1, embed())
    embedding = embed()
    if work == "guidance":  # two predictions
        if switched_off == "turns":
            return partial(step, 2, embedding)
        return lambda: torch.cat([step(1, embedding), step(1, embedding)])
    return partial(step, 1, embedding)


def run_variant(variant: str, work: str, size: int, folder: Path) -> None:
    """Serve a variant; what it gives is left in the folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_grad_enabled(False)
    if variant in MONAI:
        call = MONAI[variant](monai_work(work, size, device))
    else:
        call = our_work(work, size, variant, folder, device)

    def save_first(result: torch.Tensor) -> dict[str, float]:
        path = result_file(folder, work, size, variant)
        if not path.is_file():
            torch.save(result, path)
        return {}

    serve(call, device, save_first)


def result_file(folder: Path, work: str, size: int, variant: str) -> Path:
    """Where a variant leaves what it gives."""
    return folder / f"{work} {size} {variant}.pt"


@contextmanager
def published_checkpoint() -> Iterator[Path]:
    """A folder with MONAI's files of networks of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_checkpoint(folder, VERSION, build_networks(VERSION, PUBLISHED), network_config(VERSION, PUBLISHED))
        yield folder


def measure(folder: Path, work: str, size: int, variants: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, memory and deviation of all variants."""
    print(f"measuring {work}, latent {size}^3", flush=True)
    command = ["-m", "benchmarks.networks", "--folder", folder, "--work", work, "--size", size, "--serve"]
    results = take_turns({variant: [*map(str, command), variant] for variant in variants}, repeats)
    outputs = {
        variant: torch.load(result_file(folder, work, size, variant), map_location="cpu").float()
        for variant, result in results.items()
        if result
    }
    for variant, output in outputs.items():
        results[variant]["deviation"] = (output - next(iter(outputs.values()))).abs().max().item()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, nargs="+", default=list(WORK))
    parser.add_argument("--size", type=int, help="edge of the latent in voxels, a multiple of 8")
    parser.add_argument(
        "--variants", nargs="+", help='instead of those that are measured otherwise: "float32 exact 1GB"'
    )
    parser.add_argument(
        "--repeats", type=int, help="instead of how often it is otherwise; 0 for once, without warming up a CPU"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        run_variant(args.serve, args.work[0], args.size, args.folder)
        return
    with published_checkpoint() as folder:
        for work in args.work:
            size, repeats, variants = WORK[work]
            size, repeats = args.size or size, repeats if args.repeats is None else args.repeats
            results = measure(folder, work, size, args.variants or on_this_machine(variants), repeats)
            print(f"\n{table(results)}\n", flush=True)


def on_this_machine(variants: list[str]) -> list[str]:
    """On a GPU without what is done on a CPU alone, and with MONAI under autocast."""
    if not torch.cuda.is_available():
        return variants
    beside = list(MONAI) if "MONAI" in variants else []
    return [*beside, *(one for one in variants if one not in MONAI and not one.endswith(CPU_ALONE))]


def table(results: dict[str, dict[str, float]]) -> str:
    """In Markdown; ratios to the first variant that did not fail."""
    unit, rows = next(filter(None, results.values()), {}), []
    for variant, result in results.items():
        if not result:
            rows.append([variant, "failed", *[""] * 4])
            continue
        faster, share = unit["seconds"] / result["seconds"], result["megabytes"] / unit["megabytes"]
        seconds = f"{result['seconds']:{'#.3g' if result['seconds'] < 1 else '.2f'}}"
        numbers = seconds, f"{faster:.2f}", f"{result['megabytes']:.0f}", f"{share:.2f}"
        rows.append([variant, *numbers, f"{result['deviation']:.1e}"])
    return markdown.table(["variant", "seconds", "times as fast", "peak MB", "share", "deviation"], rows)


if __name__ == "__main__":
    main()
