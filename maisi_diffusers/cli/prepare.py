r"""
Make a data set to train on from volumes and their segmentations: label maps with new classes and the body, regions,
folds, and the data list of it all; or check a data list.

Example:

```bash
maisi-ct prepare --images cts --labels totalsegmentations --vocabulary totalsegmentator \
    --new_class "kidney tumor" 129 kidney_tumor_masks --class_organs "kidney tumor" "left kidney" "right kidney" \
    --output_dir data
maisi-ct prepare --check data/dataset.json
```

The output has `labels/<case>.nii.gz` and `dataset.json`; images stay where they are. Run it again to go on where it
was interrupted. `scripts/prepare_dataset.py` is the same command: under `torchrun --standalone --nproc_per_node 8` or
`accelerate launch --multi_gpu --num_processes 8` its processes share the cases, with GPUs or without (accelerate's
`--cpu` starts a single one).
"""

import argparse
from functools import partial
from pathlib import Path

from accelerate import PartialState

from ..training.make_dataset import check, prepare
from ..training.processes import TIMEOUT
from .scripts import ScriptParser, of_cases, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = ScriptParser(prog="maisi-ct prepare", description="Make a data set to train on, or check a data list.")
    parser.add_argument(
        "--images", type=Path, help="folder of volumes, <case>.nii.gz, with or without nnU-Net's _0000"
    )
    parser.add_argument(
        "--labels", type=Path, help="folder of their segmentations, <case>.nii.gz or <case>/<any name>.nii.gz"
    )
    parser.add_argument("--vocabulary", choices=["maisi", "totalsegmentator"], help="what their labels mean")
    parser.add_argument("--output_dir", type=Path, help="folder of the label maps and dataset.json")
    parser.add_argument(
        "--new_class",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "INDEX", "SOURCE"),
        help="a class on a free index of MAISI's vocabulary: SOURCE is a folder of masks, named as the segmentations "
        "are, or the name or number of a label of the segmentations; may be given several times",
    )
    parser.add_argument(
        "--class_organs",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "ORGAN"),
        help="the new class NAME is a tumor of these organs of MAISI's vocabulary; may be given several times",
    )
    parser.add_argument("--modality", default="ct", help="what the volumes are, e.g. ct or mri_t1")
    parser.add_argument(
        "--body_region",
        nargs="+",
        metavar="WORD",
        help="head, chest, thorax, abdomen, pelvis, lower: if no label tells",
    )
    parser.add_argument("--num_folds", type=int, default=5, help="parts for cross-validation")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--overwrite", action="store_true", help="make label maps again that are in --output_dir")
    parser.add_argument("--check", type=Path, metavar="LIST", help="say what is wrong with this data list instead")
    args = parser.parse_args(argv)
    if args.check is None:
        for name in ("images", "labels", "vocabulary", "output_dir"):
            if getattr(args, name) is None:
                parser.error(f"argument --{name} is required, unless --check is given")
    return args


def prepare_or_check(args: argparse.Namespace) -> dict:
    """Make the data set, or check a list; gives what there is to tell of it to a program."""
    state = PartialState(cpu=True, timeout=TIMEOUT)
    if args.check is None:
        told = of_cases(args.output_dir / "dataset.json", *prepare(args, state))
    else:
        count, problems = check(args.check, state)
        told = {"data_list": str(args.check), "cases": count, "problems": problems}
        if problems:
            told["error"] = f"{args.check} has {len(problems)} problem(s)"
        if state.is_main_process:
            print("\n".join(problems) or f"{count} cases, nothing wrong")
    state.destroy_process_group()
    return told if state.is_main_process else {}


def main(argv: list[str] | None = None) -> None:
    """Prepare or check; exit with code 1 if anything is wrong. What is wrong with a list is said on stdout."""
    args = parse_args(argv)
    run(partial(prepare_or_check, args), args.as_json)
