r"""
Do the published example calls work from the command line, with the model inside the package?

    python -m benchmarks.example_calls
    python -m benchmarks.example_calls --seed 1 --output calls

Each is to give a label map with what was asked for and a CT that passes the quality check for the labels in it; the
exit code is 1 if one does not. Sizes of 0 to 1 are those of the conditions, see docs/mask_database.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from maisi_diffusers.anatomy import LABELS

from . import markdown

# Names of what is to be there, and the options; a size is also one of these.
CALLS = [
    (["lung tumor"], "--body-region chest"),
    (["lung tumor"], "--body-region chest --output-size 192 192 128 --spacing 2 2 3"),
    (["liver"], "--body-region abdomen"),
    (["hepatic tumor"], "--body-region abdomen"),
    (["pancreatic tumor"], "--body-region abdomen"),
    (["colon cancer primaries"], "--body-region abdomen"),
    (["bone lesion"], "--body-region chest"),
]
SIZES = [
    {"hepatic tumor": 0.3, "liver": 0.5},
    {"pancreas": 0.5},
    {"lung tumor": 0.5},
    {"pancreatic tumor": 0.5},
    {"colon cancer primaries": 0.5},
    {"bone lesion": 0.5},
    {"hepatic tumor": 0.9},
    {"hepatic tumor": 0.0},
]


def all_calls() -> list[tuple[list[str], list[str]]]:
    """What is to be there, and the options for it."""
    calls = [
        (names, [*options.split(), *(one for name in names for one in ("--anatomy", name))])
        for names, options in CALLS
    ]
    for sizes in SIZES:
        options = [one for name, size in sizes.items() for one in ("--size", f"{name}={size}")]
        calls.append((list(sizes), options))
    return calls


def try_call(names: list[str], options: list[str], output: Path) -> tuple[bool, list[str]]:
    """Whether it does what it is to do, and a row that says so."""
    command = ["maisi-ct", "generate", "--json", "--output", output, *options]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True)
    shown = " ".join(f'"{one}"' if " " in one else one for one in options)
    if done.returncode != 0:
        return False, [shown, "failed", "", ""]
    (image,) = json.loads(done.stdout)["images"]
    labels = np.asarray(nib.load(image["labels"]).dataobj)
    voxel = np.prod(nib.load(image["labels"]).header.get_zooms()) / 1000
    ml = {name: np.count_nonzero(labels == LABELS[name]) * voxel for name in names}
    passed = image["quality"]["passed"]
    sizes = json.loads(Path(image["record"]).read_text())["label_map"].get("anatomy", {})
    reached = [f"{name} {sizes[name]['reached']:.2f}" for name in names if "reached" in sizes.get(name, {})]
    volumes = ", ".join(f"{name} {volume:.1f} ml" for name, volume in ml.items())
    return passed and all(ml.values()), [shown, volumes, ", ".join(reached), "passed" if passed else "**not passed**"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder that the images are left in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = [
            try_call(names, [*options, "--seed", str(args.seed)], (args.output or Path(temporary)) / f"{i:02}")
            for i, (names, options) in enumerate(all_calls())
        ]
    print(
        markdown.table(
            ["options", "what was asked for", "sizes reached", "quality check"], [row for _, row in results]
        )
    )
    sys.exit(not all(is_so for is_so, _ in results))


if __name__ == "__main__":
    main()
