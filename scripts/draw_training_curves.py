r"""
Draw the losses of trainings, and keep them as a small table.

Example:

```bash
python scripts/draw_training_curves.py --runs work/vae work/unet --every 50 --output docs/training
```

It reads `log.jsonl` of every run and writes `docs/training.png` and `docs/training.csv`: means over so many steps.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from maisi_diffusers.files import write_atomically
from maisi_diffusers.training.trackers import read_log


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = argparse.ArgumentParser(description="Draw the losses of trainings, and keep them as a small table.")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="output folders of trainings")
    parser.add_argument("--every", type=int, default=50, help="steps that a point is the mean of")
    parser.add_argument("--output", type=Path, required=True, help="path of both files, without their endings")
    args = parser.parse_args(input_args)
    if len({run.name for run in args.runs}) < len(args.runs):
        parser.error("argument --runs: two folders have one name, by which the curves are told apart: rename one")
    if args.every <= 0:
        parser.error(f"argument --every: {args.every} is not allowed, give more than 0")
    return args


def mean_losses(run: Path, every: int) -> dict[str, list[tuple[int, float]]]:
    """Name of a loss -> pairs of the last step and the mean of so many steps; raises a `FileNotFoundError`."""
    lines = read_log(run / "log.jsonl")
    if not lines:
        raise FileNotFoundError(f"{str(run)!r} has no log.jsonl: give the output folder of a training")
    names = dict.fromkeys(name for line in lines for name in line if name.endswith("loss"))
    means = {}
    for name in names:
        logged = [(line["step"], line[name]) for line in lines if name in line]
        parts = [logged[i : i + every] for i in range(0, len(logged), every)]
        means[name] = [(part[-1][0], float(np.mean([value for _, value in part]))) for part in parts]
    return means


def main(input_args: list[str] | None = None) -> None:
    """Write the table and the picture."""
    args = parse_args(input_args)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = {run.name: mean_losses(run, args.every) for run in args.runs}
    with (
        write_atomically(args.output.with_name(f"{args.output.name}.csv")) as temporary,
        temporary.open("w", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["run", "loss", "step", "mean"])
        for run, curves in losses.items():
            table.writerows(
                [run, name, step, f"{value:.5g}"] for name, curve in curves.items() for step, value in curve
            )

    figure, axes = plt.subplots(1, len(losses), figsize=(3.2 * len(losses), 2.8), layout="constrained", squeeze=False)
    for axis, (run, curves) in zip(axes[0], losses.items()):
        axis.plot(*zip(*curves["loss"]))
        axis.set(title=run, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("training loss")
    with write_atomically(args.output.with_name(f"{args.output.name}.png")) as temporary:
        figure.savefig(temporary, dpi=100)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
