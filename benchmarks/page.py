"""docs/performance.md and its plots, of what [`run`] has measured."""

from collections.abc import Iterator
from pathlib import Path

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
    "step": "A step of UNet and ControlNet",
    "decode": "Decoding",
    "encode": "Encoding",
}
# Stage of the plan -> work and tiling of the benchmark.
STAGES = {
    "embedding": ("embedding", "off"),
    "step": ("step", "off"),
    "decode off": ("decode", "off"),
    "decode exact": ("decode", "auto"),
}


def write_page(results: dict[str, dict], folder: Path) -> None:
    """Write what there is of the parts."""
    (folder / "performance.md").write_text("\n\n".join(sections(results)) + "\n")
    draw_speed(results, folder / "performance.png")
    if "solvers" in results:
        solvers.draw(results["solvers"]["measured"], folder / "solvers.png")


def sections(results: dict[str, dict]) -> Iterator[str]:
    """Of the page, in Markdown."""
    yield "# Speed and memory"
    yield (
        "Written by `python -m benchmarks.run`. The networks have the published architecture and random weights;\n"
        "MONAI in float32 is the unit, measured in the same run. A variant is a dtype and a way to tile (see\n"
        "`maisi-ct generate`), with its bound of memory if it has one, and without what is switched off to see what\n"
        "it is worth."
    )
    yield "![Times as fast as MONAI](performance.png)"
    for name, part in results.items():
        measured = part["measured"]
        if name == "networks":
            for work, of_work in measured.items():
                size = networks.WORK[work][0]
                yield f"## {TITLES[work]}, latent {size} x {size} x {size}"
                yield networks.table(of_work)
            yield "## Memory, as told beforehand"
            yield "What `maisi-ct info --plan` tells of these stages, and what they took."
            yield memory_table(measured)
        elif name == "tiling":
            for size, of_size in measured.items():
                yield f"## Decoding within bounds, latent {size} x {size} x {size}"
                yield "Against one piece, whose result slabs are to equal."
                yield networks.table(of_size)
        elif name == "whole":
            yield "## A whole CT of 256 x 256 x 128 voxels in 30 steps, from its label map"
            yield whole.table(measured)
        elif name == "large" and measured:
            yield "## A whole CT of 512 x 512 x 512 voxels in 30 steps"
            yield whole.table(measured)
        elif name == "solvers":
            yield "## Solvers, by the model inside the package"
            yield (
                "Distance from the end of the flow (500 steps of Euler's method): of the latents, and of the images;\n"
                "in brackets how many times the networks were asked."
            )
            yield solvers.table(measured)
            yield "![Difference by the number of calls](solvers.png)"
        yield f"*{part['machine']}*"


def memory_table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """Of each stage what the plan tells and what was measured."""
    pipe = MaisiCTPipeline(
        AutoencoderKLMaisi(), MaisiUNet3DConditionModel(), MaisiRFlowScheduler(), MaisiControlNetModel()
    )
    rows = []
    for stage, (work, tiling) in STAGES.items():
        size = networks.WORK[work][0]
        for name, dtype in networks.DTYPES.items():
            told = plan_memory(pipe, (4 * size,) * 3, dtype)[stage] / 1e6
            taken = measured[work][f"{name} {tiling}"]["megabytes"]
            rows.append([f"{stage}, latent {size}^3", name, f"{told:.0f}", f"{taken:.0f}", f"{told / taken:.2f}"])
    return markdown.table(["stage", "dtype", "told, MB", "measured, MB", "told / measured"], rows)


def draw_speed(results: dict[str, dict], path: Path) -> None:
    """Bars: how many times as fast as MONAI, in either dtype."""
    rows = {TITLES[work]: of_work for work, of_work in results.get("networks", {}).get("measured", {}).items()}
    if "whole" in results:
        rows["A whole CT"] = results["whole"]["measured"]
    figure = Figure(figsize=(7, 0.7 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for i, (dtype, offset) in enumerate((("bfloat16", -0.2), ("float32", 0.2))):
        for y, of_work in enumerate(reversed(rows.values())):
            variant = next((f"{dtype} {tiling}" for tiling in ("auto", "off") if f"{dtype} {tiling}" in of_work), None)
            if variant is not None:
                faster = of_work["MONAI"]["seconds"] / of_work[variant]["seconds"]
                told = axes.get_legend_handles_labels()[1]
                axes.barh(y + offset, faster, 0.38, color=f"C{i}", label=None if dtype in told else dtype)
                axes.text(faster, y + offset, f" {faster:.1f}", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), reversed(rows))
    axes.set_xlabel("times as fast as MONAI in float32")
    axes.legend()
    figure.savefig(path, dpi=120)
