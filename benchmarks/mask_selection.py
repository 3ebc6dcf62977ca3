r"""
How long does it take, and how much memory, to choose a label map in the mask database and make it ready?

    python -m benchmarks.mask_selection
    python -m benchmarks.mask_selection --size 256

It writes a database of label maps: phantoms of chest and abdomen, enlarged to the wanted grid and to half of it. It
asks for one with a tumor on a grid that the database has, and on one that it has not: the nearest is resampled.
What is measured is all that `MaisiCTPipeline` does between the request and the first network: search, reading,
resampling, the body label, the variant with its tumor elsewhere. Every line is a process of its own, so that the peak
of its memory, with Python and torch in it, is its own.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging

from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline, MaisiMaskDatabase
from maisi_diffusers.imaging import labels_to_nifti, spacing_affine
from maisi_diffusers.phantom import make_phantom

PHANTOM_SIZE = 64  # voxels along each axis, before it is enlarged
FIELD_OF_VIEW = 480.0  # mm
TUMORS = ("hepatic tumor", "pancreatic tumor", "colon cancer primaries", "lung tumor", "bone lesion")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PHANTOM_TINY)
    parser.add_argument("--size", type=int, default=512, help="voxels along each axis, a multiple of 128")
    return parser.parse_args()


def write_label_maps(folder: Path, size: int) -> None:
    """A label map for every tumor with a size and with half of it, the same field of view."""
    for seed, tumor in enumerate(TUMORS):
        spacing = (FIELD_OF_VIEW / PHANTOM_SIZE,) * 3
        phantom = make_phantom(seed, ("chest", "abdomen"), (PHANTOM_SIZE,) * 3, spacing, tumor=tumor)
        labels = np.asarray(phantom.labels.dataobj)
        for voxels in (size, size // 2):
            factor = voxels // PHANTOM_SIZE
            larger = labels.repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
            label_map = labels_to_nifti(larger, spacing_affine((FIELD_OF_VIEW / voxels,) * 3))
            label_map.to_filename(folder / f"{tumor.replace(' ', '_')}_{voxels}.nii.gz")


def choose(model: Path, label_maps: Path, tumor: str, size: int, spacing: float) -> tuple[float, float]:
    """Seconds from the request to the label map, and the peak of the memory in GB."""
    logging.disable_progress_bar()
    pipe = MaisiCTPipeline.from_pretrained(model)
    pipe.mask_database = MaisiMaskDatabase.from_folder(label_maps)
    warnings.simplefilter("ignore")  # that a tumor found no other place
    start = time.perf_counter()
    chosen, *_ = pipe.look_up_masks(
        ["chest", "abdomen"], [tumor], 1, torch.Generator().manual_seed(0), (size,) * 3, (spacing,) * 3
    )
    seconds = time.perf_counter() - start
    assert chosen[0].shape == (size,) * 3
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    args = parse_args()
    own = FIELD_OF_VIEW / args.size
    with tempfile.TemporaryDirectory() as folder:
        write_label_maps(Path(folder), args.size)
        MaisiMaskDatabase.from_folder(folder)
        print(f"| {args.size}^3 voxels | seconds | peak, GB |")
        print("|---|---|---|")
        for tumor in TUMORS:
            for name, spacing in (("its own grid", own), ("another grid", 0.9 * own)):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    task = process.submit(choose, args.model, folder, tumor, args.size, spacing)
                    seconds, gigabytes = task.result()
                print(f"| {tumor}, {name} | {seconds:.1f} | {gigabytes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
