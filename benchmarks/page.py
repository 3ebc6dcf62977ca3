"""docs/performance.md and its plots, of what [`run`] has measured."""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import convert_file_size_to_int
from matplotlib.figure import Figure

from maisi_diffusers import (
    AutoencoderKLMaisi,
    MaisiControlNetModel,
    MaisiCTPipeline,
    MaisiRFlowScheduler,
    MaisiUNet3DConditionModel,
)
from maisi_diffusers.pipelines.memory_plan import plan_memory

from . import markdown, networks, solvers, whole

TITLES = {
    "embedding": "Embedding a label map",
    "doubling": "Doubling the grid, the last block of the UNet that does",
    "step": "A step of UNet and ControlNet",
    "decode": "Decoding",
    "encode": "Encoding",
    "guidance": "The two predictions of a guided step",
    "whole": "A whole CT of 256 x 256 x 128 voxels in 30 steps, from its label map",
    "large": "A whole CT of 512 x 512 x 512 voxels",
}
# Stage of the plan -> work and tiling of the benchmark.
STAGES = {
    "embedding": ("embedding", "off"),
    "step": ("step", "off"),
    "decode off": ("decode", "off"),
    "decode exact": ("decode", "auto"),
}


# Work, tiling, and how many times as fast as MONAI in float32 it is to be, in float32 and in bfloat16.
FASTER = (("step", "off", (1.35, 2.7)), ("decode", "auto", (1.2, 2.7)), ("encode", "auto", (1.2, 2.4)))


def write_page(results: dict[str, dict], folder: Path) -> list[str]:
    """Write what there is of the parts; returns the rows that tell of something that does not hold."""
    text = "\n\n".join(sections(results)) + "\n"
    (folder / "performance.md").write_text(text)
    if results.keys() & {"networks", "whole"}:
        draw_speed(results, folder / "performance.png")
    if "solvers" in results:
        solvers.draw(results["solvers"]["measured"], folder / "solvers.png")
    return [row for row in text.splitlines() if row.endswith("** |")]


def sections(results: dict[str, dict]) -> Iterator[str]:
    """Of the page, in Markdown."""
    yield "# Speed and memory"
    yield (
        "Written by `python -m benchmarks.run`. The networks have the published architecture and random weights;\n"
        "MONAI in float32 is the unit, measured in the same run. A variant is a dtype and a way to tile (see\n"
        "`maisi-ct generate`), with its bound of memory if it has one, and without what is switched off to see what\n"
        "it is worth."
    )
    if any(part["on_gpu"] for part in results.values()):
        yield (
            "On a GPU MONAI autocast is MONAI in float16 where autocast takes it, as MAISI's published scripts run\n"
            "it; all work has been done once before it is measured."
        )
    if results.keys() & {"networks", "whole"}:
        yield "![Times as fast as MONAI](performance.png)"
    if promises := promised(results):
        yield "## What is promised"
        yield (
            "Asked of two CPU cores. Memory is what the work adds at its highest. Where one piece does not fit, the\n"
            "deviation is that from the first variant that does, and the time of one piece is told from that of the\n"
            "smaller latent, by their voxels."
        )
        yield markdown.table(["what", "asked", "measured", ""], promises)
    for name, part in results.items():
        measured = part["measured"]
        if name == "networks":
            for work, of_work in measured.items():
                size = networks.WORK[work][0]
                yield f"## {TITLES[work]}, latent {size} x {size} x {size}"
                yield networks.table(of_work)
            yield "## Memory, as told beforehand"
            yield "What `maisi-ct info --plan` tells of these stages, and what they took."
            yield memory_table(measured, part["on_gpu"])
        elif name == "tiling":
            for size, of_size in measured.items():
                yield f"## Decoding within bounds, latent {size} x {size} x {size}"
                yield "Against the first of them, whose result the others are to equal."
                yield networks.table(of_size)
        elif name in ("whole", "large"):
            yield f"## {TITLES[name]}"
            yield whole.table(measured)
        elif name == "solvers":
            yield "## Solvers, by the model inside the package"
            yield (
                "Distance from the end of the flow (500 steps of Euler's method): of the latents, and of the images;\n"
                "in brackets how many times the networks were asked. Run on the CPU."
            )
            yield solvers.table(measured)
            yield solvers.advice(measured)
            yield "![Difference by the number of calls](solvers.png)"
        yield f"*{part['machine']}*"


def promised(results: dict[str, dict]) -> list[list[str]]:
    """Rows of what a CPU has measured: what, what is asked, what was measured, and whether that is so."""
    results = {name: part for name, part in results.items() if not part["on_gpu"]}
    rows = []

    def compare(what: str, asked: float, value: float, unit: str = "", at_least: bool = False) -> None:
        is_so = value >= asked if at_least else value <= asked
        sign = "at least" if at_least else "at most"
        rows.append([what, f"{sign} {asked:g}{unit}", f"{value:.3g}{unit}", "holds" if is_so else "**does not hold**"])

    def compare_bound(what: str, variant: str, ours: dict[str, float]) -> None:
        bound = convert_file_size_to_int(variant.split()[-1]) / 1e6
        compare(f"{what}, memory over the bound", 1.1, ours["megabytes"] / bound)

    of_networks = results.get("networks", {}).get("measured", {})
    for work, tiling, asked in FASTER:
        for dtype, times in zip(networks.DTYPES, asked):
            unit, ours = of_networks.get(work, {}).get("MONAI"), of_networks.get(work, {}).get(f"{dtype} {tiling}")
            if unit and ours:
                compare(f"{TITLES[work]}, {dtype}, times as fast", times, unit["seconds"] / ours["seconds"], "", True)
    for variant, share in (("float32 auto", 0.5), ("float32 exact 256MiB", 0.25)):
        unit, ours = of_networks.get("decode", {}).get("MONAI"), of_networks.get("decode", {}).get(variant)
        if unit and ours:
            what = f"{TITLES['decode']}, {variant}"
            compare(f"{what}, share of memory", share, ours["megabytes"] / unit["megabytes"])
            compare(f"{what}, deviation", 1e-4, ours["deviation"])
    variant = "float32 exact 256MiB"
    if ours := of_networks.get("encode", {}).get(variant):
        compare_bound(f"{TITLES['encode']}, {variant}", variant, ours)
        compare(f"{TITLES['encode']}, {variant}, deviation", 1e-4, ours["deviation"])
    tiling = results.get("tiling", {}).get("measured", {})
    one_piece = tiling.get("48", {}).get("float32 off")
    for size, of_size in tiling.items():
        for variant, ours in of_size.items():
            what, is_first = f"latent {size}^3, {variant}", variant == next(iter(of_size))
            if not ours or variant == "float32 off":
                continue
            compare_bound(what, variant, ours)
            if variant.startswith("float32 lean"):
                compare(f"{what}, largest difference", 1, 2000 * ours["deviation"], " HU")
                continue
            if not is_first:
                compare(f"{what}, deviation", 1e-4, ours["deviation"])
            if one_piece:  # by the voxels where it does not fit
                seconds = one_piece["seconds"] * (int(size) / 48) ** 3
                compare(f"{what}, times the time of one piece", 1.3, ours["seconds"] / seconds)
    ct = results.get("whole", {}).get("measured", {})
    if ct.get("MONAI") and (ours := ct.get("bfloat16 auto")):
        compare("a whole CT, bfloat16, times as fast", 2.5, ct["MONAI"]["seconds"] / ours["seconds"], "", True)
        compare("a whole CT, time outside the networks", 3, 100 * ours["outside"], " %")
    for variant, ours in results.get("large", {}).get("measured", {}).items():
        if ours:
            compare(f"a CT of 512^3 voxels, {variant}, memory", 12, ours["megabytes"] / 1000, " GB")
    work = {TITLES[name]: of_work for name, of_work in of_networks.items()}
    work |= {f"latent {size}^3": of_size for size, of_size in tiling.items()}
    work |= {TITLES[name]: results[name]["measured"] for name in ("whole", "large") if name in results}
    may_fail = (*networks.MONAI, "float32 off")  # for want of memory, as they work in one piece
    for what, of_work in work.items():
        for variant, ours in of_work.items():
            if not ours and variant not in may_fail:
                rows.append([f"{what}, {variant}", "ends", "failed", "**does not hold**"])
    return rows


def memory_table(measured: dict[str, dict[str, dict[str, float]]], on_gpu: bool) -> str:
    """Of each stage what the plan tells and what was measured."""
    with init_empty_weights():
        vae, unet, controlnet = AutoencoderKLMaisi(), MaisiUNet3DConditionModel(), MaisiControlNetModel()
    pipe = MaisiCTPipeline(vae, unet, MaisiRFlowScheduler(), controlnet)
    device, rows = torch.device("cuda" if on_gpu else "cpu"), []
    for stage, (work, tiling) in STAGES.items():
        size = networks.WORK[work][0]
        for name, dtype in networks.DTYPES.items():
            taken = measured.get(work, {}).get(f"{name} {tiling}", {}).get("megabytes")
            # What it tells of slabs is told for the CPU; a GPU takes one piece.
            if taken is None or (stage == "decode exact" and on_gpu):
                continue
            told = plan_memory(pipe, (4 * size,) * 3, dtype, device)[stage] / 1e6
            is_near = "within 15 %" if abs(told / taken - 1) <= 0.15 else "**not within 15 %**"
            row = [f"{told:.0f}", f"{taken:.0f}", f"{told / taken:.2f}", is_near]
            rows.append([f"{stage}, latent {size}^3", name, *row])
    return markdown.table(["stage", "dtype", "told, MB", "measured, MB", "told / measured", ""], rows)


def draw_speed(results: dict[str, dict], path: Path) -> None:
    """Bars: how many times as fast as MONAI, in either dtype."""
    of_networks = results.get("networks", {}).get("measured", {})
    rows = {TITLES[work]: of_work for work, of_work in of_networks.items() if of_work.get("MONAI")}
    if "whole" in results:
        rows["A whole CT"] = results["whole"]["measured"]
    figure = Figure(figsize=(7, 0.7 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for i, (dtype, offset) in enumerate((("bfloat16", -0.2), ("float32", 0.2))):
        for y, of_work in enumerate(reversed(rows.values())):
            variant = next((f"{dtype} {tiling}" for tiling in ("auto", "off") if f"{dtype} {tiling}" in of_work), None)
            if variant is not None and of_work[variant] and of_work["MONAI"]:
                faster = of_work["MONAI"]["seconds"] / of_work[variant]["seconds"]
                told = axes.get_legend_handles_labels()[1]
                axes.barh(y + offset, faster, 0.38, color=f"C{i}", label=None if dtype in told else dtype)
                axes.text(faster, y + offset, f" {faster:.1f}", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.1)  # room for the numbers
    axes.set_yticks(range(len(rows)), reversed(rows))
    axes.set_xlabel("times as fast as MONAI in float32")
    if axes.containers:
        axes.legend()
    figure.savefig(path, dpi=120)
