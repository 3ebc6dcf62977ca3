r"""
How near phantoms are to a real CT: HU, spread and noise of organs, in Markdown.

    python -m benchmarks.phantom_calibration --image ct.nii.gz --labels segmentation.nii.gz

The real CT is without contrast agent and segmented by TotalSegmentator, and so are the phantoms, drawn on grids of its
spacing. All is of organs without their edges: the median, the standard deviation, and of the differences between
neighbours along X the noise (divided by the square root of 2) and the correlation that follows from it.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from maisi_diffusers.anatomy import LABELS, load_label_map
from maisi_diffusers.imaging import load_volume, spacing_of, to_ras
from maisi_diffusers.phantom import Subject, make_phantom

from . import markdown

ORGANS = ("liver", "spleen", "left kidney", "aorta", "heart", "left autochthon", "left iliopsoas", "left hip")
ORGANS += ("left lung upper lobe", "right lung lower lobe", "spinal cord")
FIRST_SEED = 400_000
SIZE = (128, 112, 128)
MIN_VOXELS = 100


def measure(image: np.ndarray, labels: np.ndarray) -> dict[str, tuple[float, float, float, float]]:
    """Organ -> median, standard deviation, noise and correlation of neighbours, of a CT (X, Y, Z) in HU."""
    figures = {}
    for name in ORGANS:
        inside = ndimage.binary_erosion(labels == LABELS[name])
        pairs = inside[1:] & inside[:-1]
        if inside.sum() < MIN_VOXELS or not pairs.any():
            continue
        values = image[inside].astype(np.float64)
        step = (image[1:].astype(np.float64) - image[:-1])[pairs].std() / np.sqrt(2)
        figures[name] = (float(np.median(values)), values.std(), step, 1 - step**2 / values.var())
    return figures


def measure_phantoms(num: int, spacing: tuple[float, float, float]) -> list[dict[str, tuple[float, ...]]]:
    """The same of phantoms without contrast."""
    figures = []
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + num), desc="Phantoms"):
        subject = Subject.draw(seed, phase="none")
        phantom = make_phantom(seed, ["chest", "abdomen"], SIZE, spacing, subject=subject)
        figures.append(measure(np.asarray(phantom.image.dataobj), np.asarray(phantom.labels.dataobj)))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--num_phantoms", type=int, default=12)
    args = parser.parse_args()
    image, labels = to_ras(load_volume(args.image)), to_ras(load_label_map(args.labels, "totalsegmentator"))
    real = measure(np.asarray(image.dataobj), np.asarray(labels.dataobj))
    phantoms = measure_phantoms(args.num_phantoms, spacing_of(image))
    rows = []
    for name, own in real.items():
        theirs = np.array([one[name] for one in phantoms if name in one])
        ranges = [f"{low:.2g} to {high:.2g}" for low, high in zip(theirs[:, 3:].min(0), theirs[:, 3:].max(0))]
        ranges = [f"{low:.0f} to {high:.0f}" for low, high in zip(theirs[:, :3].min(0), theirs[:, :3].max(0))] + ranges
        values = [*(f"{value:.0f}" for value in own[:3]), f"{own[3]:.2g}"]
        rows.append([name, *(f"{value} / {of_phantoms}" for value, of_phantoms in zip(values, ranges))])
    print(markdown.table(["real / phantoms", "median, HU", "deviation, HU", "noise, HU", "correlation"], rows))


if __name__ == "__main__":
    main()
