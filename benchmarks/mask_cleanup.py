r"""
How long does the clean-up of a generated label map take, and how long a plain loop over its labels?

    python -m benchmarks.mask_cleanup
    python -m benchmarks.mask_cleanup --size 128 --repeats 3

The label map is a phantom from head to pelvis with all its labels, spoiled as mask models spoil theirs: pieces of
every label that these know lie elsewhere in the body. The plain loop is what comes to mind first: for every label,
`scipy.ndimage.label` on the whole volume, and all but the largest component becomes body. It does one of the eight
rules of the clean-up. Both run in turn in one process. Of 256^3 voxels the clean-up is to take 15 s at most, and a
fifth of the loop's time; the exit code is 1 if it does not.
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from maisi_diffusers.anatomy import BODY, LABELS, MASK_VAE_LABELS, clean_up
from maisi_diffusers.phantom import make_phantom

FIELD_OF_VIEW = 960.0  # mm, from head to pelvis
MAX_SECONDS, MIN_FASTER = 15.0, 5.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="voxels along each axis")
    parser.add_argument("--repeats", type=int, default=3, help="the median is printed")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def spoiled_label_map(size: int, seed: int) -> np.ndarray:
    """A label map (size, size, size), uint8, with pieces of every organ elsewhere, also of those it is without."""
    spacing = (FIELD_OF_VIEW / size,) * 3
    phantom = make_phantom(seed, ("head", "pelvis"), (size,) * 3, spacing, tumor="hepatic tumor")
    labels = np.array(phantom.labels.dataobj)
    rng = np.random.default_rng(seed)
    body = np.argwhere(labels == BODY)
    for label in MASK_VAE_LABELS:
        if label in (0, BODY):
            continue
        for x, y, z in rng.choice(body, 8):
            view = labels[x : x + 3, y : y + 3, z : z + 3]
            view[view == BODY] = label
    return labels


def plain_loop(labels: np.ndarray) -> np.ndarray:
    """The largest component of every label; the others become body."""
    clean = labels.copy()
    cube = np.ones((3, 3, 3))
    for label in np.unique(labels):
        if label in (0, BODY):
            continue
        pieces, count = ndimage.label(labels == label, cube)
        if count > 1:
            largest = np.bincount(pieces.ravel())[1:].argmax() + 1
            clean[(pieces > 0) & (pieces != largest)] = BODY
    return clean


def seconds(function: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    args = parse_args()
    labels = spoiled_label_map(args.size, args.seed)
    _, report = clean_up(labels, LABELS["hepatic tumor"])
    print(f"{args.size}^3 voxels, {len(np.unique(labels)) - 1} labels, {len(report.organ_pieces)} organs in pieces")
    times = [
        (seconds(clean_up, labels, LABELS["hepatic tumor"]), seconds(plain_loop, labels)) for _ in range(args.repeats)
    ]
    ours, plain = np.median(times, axis=0)
    print("\n| | seconds | times as fast |")
    print("|---|---|---|")
    print(f"| loop of scipy.ndimage.label, one rule | {plain:.1f} | 1.0 |")
    print(f"| clean_up, all rules | {ours:.1f} | {plain / ours:.1f} |")
    is_slow = ours > MAX_SECONDS * (args.size / 256) ** 3 or plain < MIN_FASTER * ours
    sys.exit(int(is_slow))


if __name__ == "__main__":
    main()
