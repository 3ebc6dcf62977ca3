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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm.auto import tqdm

from maisi_diffusers.anatomy import labels_present, one_hot, regions_from_labels
from maisi_diffusers.phantom import Subject, anatomy_sizes, make_phantom, names_of_tumors
from maisi_diffusers.training.data_list import Case, DataList, write_data_list
from maisi_diffusers.training.files import write_atomically

# Where the fields of view are, and how often.
REGIONS = [
    (("chest",), 0.22),
    (("abdomen",), 0.30),
    (("chest", "abdomen"), 0.26),
    (("pelvis",), 0.14),
    (("head",), 0.08),
]
# Tumors whose organ is in the field of view of a region.
TUMORS_OF = {
    ("chest",): ("lung tumor", "hepatic tumor", "bone lesion"),
    ("abdomen",): ("hepatic tumor", "pancreatic tumor", "colon cancer primaries", "bone lesion"),
    ("chest", "abdomen"): names_of_tumors(),
    ("pelvis",): ("colon cancer primaries", "bone lesion"),
    ("head",): (),
}
DIAMETERS = (10.0, 60.0)  # mm
OTHER_SPACINGS = (2.0, 4.0)  # mm
MODALITIES = {"none": "ct_wo_contrast", "arterial": "ct_contrast", "venous": "ct_contrast"}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = argparse.ArgumentParser(description="Make a data set of digital phantoms.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--num_cases", type=int, required=True)
    parser.add_argument("--first_seed", type=int, default=0, help="cases have this seed and those after it")
    parser.add_argument("--size", type=int, nargs=3, default=[128, 128, 128], metavar=("X", "Y", "Z"), help="voxels")
    parser.add_argument("--spacing", type=float, default=3.0, help="voxel size in mm")
    parser.add_argument(
        "--other_spacings", type=float, default=0.15, help=f"share of cases with voxels of {OTHER_SPACINGS} mm instead"
    )
    parser.add_argument("--body_region", nargs="+", help="the same for all cases; all kinds if not given")
    parser.add_argument("--tumors", type=float, default=0.6, help="share of cases with a tumor")
    parser.add_argument("--num_folds", type=int, default=10, help="parts to keep one of for validation")
    parser.add_argument("--num_processes", type=int, default=1)
    args = parser.parse_args(input_args)
    for name in ("num_cases", "spacing", "num_folds", "num_processes"):
        if getattr(args, name) <= 0:
            parser.error(f"argument --{name}: {getattr(args, name)} is not allowed, give more than 0")
    return args


def draw_case(seed: int, args: argparse.Namespace) -> dict:
    """What [`make_phantom`] is asked for: region, spacing, tumor, table."""
    rng = np.random.default_rng([seed, 1])
    words, shares = zip(*REGIONS)
    region = tuple(args.body_region or words[rng.choice(len(words), p=shares)])
    spacing = rng.uniform(*OTHER_SPACINGS) if rng.random() < args.other_spacings else args.spacing
    case = {"seed": seed, "body_region": region, "size": tuple(args.size), "spacing": (round(float(spacing), 2),) * 3}
    tumors = TUMORS_OF.get(region, names_of_tumors())
    if tumors and rng.random() < args.tumors:
        case |= {"tumor": tumors[rng.integers(len(tumors))], "tumor_diameter": float(rng.uniform(*DIAMETERS))}
    return case | {"table": bool(rng.random() < 0.3)}


def make_case(seed: int, args: argparse.Namespace) -> Case:
    """Write the CT and the label map of a seed, where they are not there yet, and describe them."""
    paths = [args.output_dir / f"phantom{seed:06d}_{kind}.nii.gz" for kind in ("ct", "labels")]
    asked = draw_case(seed, args)
    phantom = None
    if not all(path.is_file() for path in paths):
        phantom = make_phantom(**asked)
        for path, image in zip(paths, (phantom.image, phantom.labels)):
            with write_atomically(path) as temporary:
                image.to_filename(temporary)
    image, labels = (nib.load(path) for path in paths)
    label_map = np.asarray(labels.dataobj)
    top, bottom = regions_from_labels(labels_present(label_map))
    phase = (phantom.subject if phantom else Subject.draw(seed)).phase
    return Case(
        image=paths[0],
        label=paths[1],
        dim=tuple(image.shape),
        spacing=asked["spacing"],
        top_region_index=one_hot(top),
        bottom_region_index=one_hot(bottom),
        modality=MODALITIES[phase],
        fold=seed % args.num_folds,
        organ_size=tuple(anatomy_sizes(label_map, asked["spacing"])),
    )


def main(input_args: list[str] | None = None) -> None:
    """Make the data set."""
    args = parse_args(input_args)
    seeds = range(args.first_seed, args.first_seed + args.num_cases)
    with ProcessPoolExecutor(args.num_processes) as pool:
        cases = list(tqdm(pool.map(make_case, seeds, [args] * len(seeds)), total=len(seeds), desc="Phantoms"))
    write_data_list(args.output_dir / "dataset.json", DataList(cases))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
