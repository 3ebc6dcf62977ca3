"""A small mask database with known answers, as a folder or a .zip."""

import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.tiny import SIZE, SPACING

LARGE = (32, 32, 32)
FINE = (1.5, 1.5, 2.0)

# name: labels, size, spacing, regions in the list (those told by the labels if None)
MASKS = {
    "chest/healthy": ([28, 115, 200], SIZE, SPACING, (1, 1)),
    "chest/tumor": ([23, 28, 115, 200], SIZE, SPACING, (1, 1)),
    "chest/large": ([28, 32, 115, 200], LARGE, SPACING, (1, 1)),
    "abdomen/healthy": ([1, 3, 4, 200], SIZE, SPACING, None),
    "abdomen/healthy too": ([1, 3, 200], SIZE, SPACING, None),
    "abdomen/pancreas": ([1, 4, 24, 200], SIZE, SPACING, (2, 2)),
    "abdomen/pancreas too": ([1, 3, 4, 24, 200], SIZE, FINE, (2, 3)),
    "abdomen/liver": ([1, 26, 200], SIZE, SPACING, None),
    "torso": ([1, 28, 93, 200], SIZE, SPACING, None),
    "heart": ([115, 200], SIZE, SPACING, None),
    "head": ([22, 26, 120, 200], SIZE, SPACING, (0, 0)),
}


def one_hot(region: int) -> list[int]:
    return [int(i == region) for i in range(4)]


def make_entry(name: str) -> dict:
    """An entry of the list."""
    labels, size, spacing, regions = MASKS[name]
    entry = {
        "pseudo_label_filename": f"./{name}.nii.gz",  # as in the released list
        "dim": list(size),
        "spacing": list(spacing),
        "label_list": labels,
    }
    if regions is not None:
        entry |= {"top_region_index": one_hot(regions[0]), "bottom_region_index": one_hot(regions[1])}
    return entry


def make_mask(labels: list[int], size: tuple[int, int, int], spacing: tuple[float, float, float]) -> nib.Nifti1Image:
    """A body, air around, and in it a slab of every other label from the top down."""
    data = np.zeros(size, dtype=np.uint8)
    data[2:-2, 2:-2] = 200
    for i, label in enumerate(labels[:-1]):
        data[4:-4, 4:-4, size[2] - 6 * i - 6 : size[2] - 6 * i - 1] = label
    return nib.Nifti1Image(data, np.diag([*spacing, 1.0]))


def make_database(folder: Path, zipped: bool = False, in_folder: str = "") -> Path:
    """Write the database; a .zip can hold its files in one more folder, as the released one does."""
    masks = folder / "masks"
    for name, (labels, size, spacing, _) in MASKS.items():
        path = masks / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_mask(labels, size, spacing).to_filename(path)
    (folder / "candidate_masks.json").write_text(json.dumps([make_entry(name) for name in MASKS]))
    if zipped:
        with zipfile.ZipFile(folder / "masks.zip", "w") as archive:
            for path in sorted(masks.rglob("*.nii.gz")):
                archive.write(path, Path(in_folder) / path.relative_to(masks))
                path.unlink()
        for path in (*masks.iterdir(), masks):
            path.rmdir()
    return folder
