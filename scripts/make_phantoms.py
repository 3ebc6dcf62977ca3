r"""
Make a data set of digital phantoms: CTs, their label maps, and the data list that the other scripts read.

Example:

```bash
python scripts/make_phantoms.py --num_cases 400 --output_dir phantoms
python scripts/make_phantoms.py --num_cases 32 --first_seed 100000 --body_region chest abdomen --output_dir unseen
```

A case depends on its seed alone. Run it again to go on where it was interrupted.
"""

import argparse
import sys
from pathlib import Path

from tqdm.auto import tqdm

from maisi_diffusers.anatomy import regions_from_words
from maisi_diffusers.training.data_list import DataList, write_data_list
from maisi_diffusers.training.phantom_dataset import OTHER_SPACINGS, PhantomDataset
from maisi_diffusers.workers import map_in_processes


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = argparse.ArgumentParser(description="Make a data set of digital phantoms.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--num_cases", type=int, required=True)
    parser.add_argument("--first_seed", type=int, default=0, help="cases have this seed and those after it")
    parser.add_argument("--size", type=int, nargs=3, default=[128, 128, 128], metavar=("X", "Y", "Z"), help="voxels")
    parser.add_argument("--spacing", type=float, default=3.0, help="voxel size in mm")
    parser.add_argument(
        "--other_spacings",
        type=float,
        default=0.15,
        help=f"share of cases with voxels of {OTHER_SPACINGS[0]:g} to {OTHER_SPACINGS[1]:g} mm instead",
    )
    parser.add_argument("--body_region", nargs="+", help="the same for all cases; all kinds if not given")
    parser.add_argument("--tumors", type=float, default=0.6, help="share of cases with a tumor")
    parser.add_argument("--num_folds", type=int, default=10, help="parts to keep one of for validation")
    parser.add_argument("--num_processes", type=int, default=1)
    args = parser.parse_args(input_args)
    for name in ("num_cases", "spacing", "num_folds", "num_processes"):
        if getattr(args, name) <= 0:
            parser.error(f"argument --{name}: {getattr(args, name)} is not allowed, give more than 0")
    for name in ("other_spacings", "tumors"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"argument --{name}: {getattr(args, name)} is not allowed, give 0 to 1")
    return args


def main(input_args: list[str] | None = None) -> None:
    """Make the data set."""
    args = parse_args(input_args)
    if args.body_region is not None:
        regions_from_words(args.body_region)
    dataset = PhantomDataset(
        folder=args.output_dir,
        size=tuple(args.size),
        spacing=args.spacing,
        other_spacings=args.other_spacings,
        body_region=None if args.body_region is None else tuple(args.body_region),
        tumors=args.tumors,
        num_folds=args.num_folds,
    )
    seeds = range(args.first_seed, args.first_seed + args.num_cases)
    made = map_in_processes(dataset.make, seeds, args.num_processes)
    cases = list(tqdm(made, total=len(seeds), desc="Phantoms"))
    write_data_list(args.output_dir / "dataset.json", DataList(cases))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
