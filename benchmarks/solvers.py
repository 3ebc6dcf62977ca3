r"""
How far the solvers of rectified flow are from the end of the flow, by the number of times that they ask the networks.

    python -m benchmarks.solvers
    python -m benchmarks.solvers --model path/to/model --size 128 --seeds 0 1 2 --output docs/solvers.png

The end is where MAISI's scheduler, Euler's method, gets in 500 steps from the same noise. Of every solver with every
number of steps two distances from it are told: of the latents, the root mean square as a share of theirs, and of the
images, the mean of the absolute differences in HU inside the body. The label maps are those of phantoms. A step of
Heun's method asks the networks twice, except the last. MONAI's own steps are rounded, and do not add up to the whole
way.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tqdm.auto import tqdm

from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline, MaisiRFlowScheduler
from maisi_diffusers.phantom import make_phantom

from . import markdown

FIRST_SEED = 200_000
FIELD_OF_VIEW = 384.0
REFERENCE_STEPS = 500
# Class and options of each.
SOLVERS = {
    "Euler (MaisiRFlowScheduler)": (MaisiRFlowScheduler, {"monai_rounding": False}),
    "Euler as MONAI has it (MaisiRFlowScheduler)": (MaisiRFlowScheduler, {"monai_rounding": True}),
    "Euler (FlowMatchEulerDiscreteScheduler)": (FlowMatchEulerDiscreteScheduler, {}),
    "Heun (FlowMatchHeunDiscreteScheduler)": (FlowMatchHeunDiscreteScheduler, {}),
    "UniPC (UniPCMultistepScheduler)": (UniPCMultistepScheduler, {}),
    "DPM-Solver++ (DPMSolverMultistepScheduler)": (DPMSolverMultistepScheduler, {}),
}
NEAR = (5.0, 1.0)  # HU from the end that advice is given for
STEPS = (4, 6, 8, 10, 15, 20, 30, 50)


class Solved:
    """Latents and images of one label map and one noise, by any solver."""

    def __init__(self, pipe: MaisiCTPipeline, size: int, seed: int):
        self.pipe, self.seed = pipe, seed
        spacing = (FIELD_OF_VIEW / size,) * 3
        self.mask = make_phantom(FIRST_SEED + seed, size=(size,) * 3, spacing=spacing).labels
        self.labels = np.asarray(self.mask.dataobj)
        self.scheduler_config = pipe.scheduler.config
        self.reference, _ = self.solve(MaisiRFlowScheduler, REFERENCE_STEPS, monai_rounding=False)
        self.reference_image = self.image(self.reference)

    def solve(self, solver: type, steps: int, **options) -> tuple[torch.Tensor, int]:
        """Latents (1, C, X, Y, Z), and how many times the networks were asked."""
        calls = []
        hook = self.pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))
        self.pipe.scheduler = solver.from_config(self.scheduler_config, **options)
        latents = self.pipe(
            mask=self.mask,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(self.seed),
            output_type="latent",
        ).images
        hook.remove()
        self.pipe.scheduler = MaisiRFlowScheduler.from_config(self.scheduler_config)
        return latents, len(calls)

    def image(self, latents: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.pipe.decode(latents, modality=1, labels=self.labels)[0, 0]

    def distances(self, latents: torch.Tensor) -> tuple[float, float]:
        """Of latents from the reference, and of their image in HU."""
        share = (latents - self.reference).square().mean().sqrt() / self.reference.square().mean().sqrt()
        difference = (self.image(latents) - self.reference_image).abs()
        return share.item(), difference[torch.from_numpy(self.labels) > 0].mean().item()


def measure(pipe: MaisiCTPipeline, size: int, seeds: list[int]) -> dict[str, list[tuple[int, float, float]]]:
    """Solver -> for each number of steps calls of the networks, and means over the seeds of the two distances."""
    results = {name: [[] for _ in STEPS] for name in SOLVERS}
    calls = {name: [0] * len(STEPS) for name in SOLVERS}
    with tqdm(total=len(seeds) * len(SOLVERS) * len(STEPS)) as progress:
        for seed in seeds:
            solved = Solved(pipe, size, seed)
            for name, (solver, options) in SOLVERS.items():
                for i, steps in enumerate(STEPS):
                    latents, calls[name][i] = solved.solve(solver, steps, **options)
                    results[name][i].append(solved.distances(latents))
                    progress.update()
    return {
        name: [
            (calls[name][i], *(sum(values) / len(seeds) for values in zip(*of_steps)))
            for i, of_steps in enumerate(rows)
        ]
        for name, rows in results.items()
    }


def table(results: dict[str, list[tuple[int, float, float]]]) -> str:
    """In Markdown."""
    rows = [
        [name, *(f"{share:.1%}, {hu:.1f} HU ({calls})" for calls, share, hu in of_solver)]
        for name, of_solver in results.items()
    ]
    return markdown.table(["solver", *(f"{steps} steps" for steps in STEPS)], rows)


def advice(results: dict[str, list[tuple[int, float, float]]]) -> str:
    """The fewest calls that come near to the end of the flow, and by which solver."""
    said = []
    for hu in NEAR:
        enough = [
            (calls, off, name, steps)
            for name, of_solver in results.items()
            for i, (steps, (calls, _, off)) in enumerate(zip(STEPS, of_solver))
            if all(later <= hu for _, _, later in of_solver[i:])
        ]
        if enough:
            calls, _, name, steps = min(enough)
            said.append(f"{hu:g} HU from {steps} steps of {name} on, {calls} calls")
        else:
            said.append(f"{hu:g} HU by none of these")
    return f"The end of the flow is reached within {', within '.join(said)}."


def draw(results: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Plot HU over the calls of the networks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in results.items():
        axes.loglog([row[0] for row in rows], [row[2] for row in rows], "o-", label=name.split(" (")[0])
    axes.set(xlabel="calls of the networks", ylabel="mean difference from the end of the flow, HU")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PHANTOM_TINY))
    parser.add_argument("--size", type=int, default=64, help="edge of the volume in voxels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, help="PNG of the plot")
    args = parser.parse_args()
    pipe = MaisiCTPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    results = measure(pipe, args.size, args.seeds)
    print(table(results), advice(results), sep="\n\n")
    if args.output is not None:
        draw(results, args.output)


if __name__ == "__main__":
    main()
