r"""
How long does it take, and how much memory, to choose a label map in the mask database and make it ready?

    python -m benchmarks.mask_selection
    python -m benchmarks.mask_selection --size 256

It writes databases of label maps: phantoms, enlarged to the wanted grid, one with a lesion of 30 mm for every tumor,
and then what tumors can be like: one of 100 mm, and many, scattered through the liver or the skeleton. It asks for
each on the grid that the database has, and on one that it has not: the label map is resampled. What is measured is all
that `MaisiCTPipeline` does between the request and the first network: search, reading, resampling, the body label, the
variant with its tumor elsewhere. Every line is a process of its own, so that the peak of its memory, with Python and
torch in it, is its own. No line of 512^3 voxels is to take more than 20 s on two cores, or 3 GB; the exit code is 1 if
one does.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging

from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline, MaisiMaskDatabase
from maisi_diffusers.anatomy import LABELS, TUMORS
from maisi_diffusers.imaging import labels_to_nifti, spacing_affine
from maisi_diffusers.phantom import make_phantom

SEED = 7  # a large liver
PHANTOM_SIZE = 64  # voxels along each axis, before it is enlarged
FIELD_OF_VIEW = 480.0  # mm
MAX_SECONDS, MAX_GIGABYTES = 20.0, 3.0


@dataclass(frozen=True)
class Lesions:
    """What there is of a tumor: so many lesions of so many mm, from one end of its organ to the other."""

    tumor: str
    count: int = 1
    diameter: float = 30.0
    regions: tuple[str, ...] = ("chest", "abdomen")


CASES = {
    "hepatic tumor": Lesions("hepatic tumor"),
    "pancreatic tumor": Lesions("pancreatic tumor"),
    "colon cancer primaries": Lesions("colon cancer primaries"),
    "lung tumor": Lesions("lung tumor"),
    "bone lesion": Lesions("bone lesion"),
    "hepatic tumor of 100 mm": Lesions("hepatic tumor", diameter=100.0),
    "ten hepatic tumors": Lesions("hepatic tumor", 10, 20.0),
    "ten lung tumors": Lesions("lung tumor", 10, 20.0),
    "ten bone lesions, ribs to pelvis": Lesions("bone lesion", 10, regions=("chest", "pelvis")),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PHANTOM_TINY)
    parser.add_argument("--size", type=int, default=512, help="voxels along each axis, a multiple of 64")
    return parser.parse_args()


def write_database(folder: Path, lesions: Lesions, size: int) -> None:
    """A label map with lesions on a grid (size, size, size)."""
    spacing = FIELD_OF_VIEW / PHANTOM_SIZE
    first = {"tumor": lesions.tumor, "tumor_diameter": lesions.diameter}
    phantom = make_phantom(SEED, lesions.regions, (PHANTOM_SIZE,) * 3, (spacing,) * 3, **first)
    labels = np.array(phantom.labels.dataobj)
    organ = np.isin(labels, TUMORS[LABELS[lesions.tumor]])
    voxels = np.argwhere(organ)
    voxels = voxels[np.argsort(voxels[:, 2], kind="stable")]
    for centre in voxels[np.linspace(0, len(voxels) - 1, lesions.count).astype(int)[1:]]:
        distance = np.linalg.norm(np.moveaxis(np.indices(labels.shape), 0, -1) - centre, axis=-1) * spacing
        labels[organ & (distance < lesions.diameter / 2)] = LABELS[lesions.tumor]
    factor = size // PHANTOM_SIZE
    larger = labels.repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
    folder.mkdir()
    labels_to_nifti(larger, spacing_affine((FIELD_OF_VIEW / size,) * 3)).to_filename(folder / "labels.nii.gz")
    MaisiMaskDatabase.from_folder(folder)


def choose(model: Path, database: Path, lesions: Lesions, size: int, spacing: float) -> tuple[float, float, int]:
    """Seconds from the request to the label map, the peak of the memory in GB, and how many places were tried."""
    logging.disable_progress_bar()
    pipe = MaisiCTPipeline.from_pretrained(model)
    pipe.mask_database = MaisiMaskDatabase(database)
    warnings.simplefilter("ignore")  # that a tumor found no other place
    start = time.perf_counter()
    (chosen,), _, (report,) = pipe.look_up_masks(
        ["abdomen"], [lesions.tumor], 1, torch.Generator().manual_seed(0), (size,) * 3, (spacing,) * 3
    )
    seconds = time.perf_counter() - start
    assert chosen.shape == (size,) * 3
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, report["tumors"][0]["tries"]


def alone(function: Callable, *arguments: object) -> object:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    args = parse_args()
    own = FIELD_OF_VIEW / args.size
    beyond = []
    print(f"| {args.size}^3 voxels | seconds | peak, GB | places tried |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, lesions in CASES.items():
            database = Path(folder) / name
            alone(write_database, database, lesions, args.size)
            for grid, spacing in (("its own grid", own), ("another grid", 0.9 * own)):
                seconds, gigabytes, tries = alone(choose, args.model, database, lesions, args.size, spacing)
                print(f"| {name}, {grid} | {seconds:.1f} | {gigabytes:.1f} | {tries} |", flush=True)
                if seconds > MAX_SECONDS or gigabytes > MAX_GIGABYTES:
                    beyond.append(f"{name}, {grid}")
    if beyond:
        sys.exit(f"more than {MAX_SECONDS:g} s or {MAX_GIGABYTES:g} GB: {'; '.join(beyond)}")


if __name__ == "__main__":
    main()
