"""The list of a mask database, written from its label maps."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from tqdm.auto import tqdm

from ..files import write_atomically
from ..imaging import load_volume, spacing_of, to_ras
from ..workers import map_in_processes
from .json_list import read_json_list
from .label_map import load_label_map
from .mask_entry import MaskEntry, read_entry
from .mask_files import safe_name
from .regions import one_hot, regions_from_labels
from .vocabulary import labels_present

SECONDS_BETWEEN_WRITES = 30.0


def write_candidates(candidates: Path, masks: Path, num_processes: int = 1) -> None:
    """Read every label map below a folder, and write the list of them as far as it is, every now and then.

    Args:
        candidates: the JSON list. Where it is there already, label maps that have been in their place for longer are
            not read again.
        masks: the folder.
        num_processes: that read label maps, see [`map_in_processes`].

    Raises:
        FileNotFoundError: if there is no such folder, or no label map in it.
        ValueError: for files that are no label maps in MAISI's vocabulary; all of them are named, once the others are
            in the list.
    """
    if not masks.is_dir():
        raise FileNotFoundError(f"No folder {str(masks)!r}; give the one with the label maps.")
    names = sorted(
        path.relative_to(masks).as_posix()
        for path in masks.rglob("*")
        if path.name.endswith((".nii", ".nii.gz")) and not path.name.startswith(".")
    )
    if not names:
        raise FileNotFoundError(f"{str(masks)!r} has no .nii or .nii.gz file; give the folder with the label maps.")

    entries = {}
    if candidates.is_file():
        written = candidates.stat().st_mtime
        known = {entry.pseudo_label_filename: entry for entry in read_json_list(candidates, read_entry)}
        entries = {name: known[name] for name in names if name in known and in_place_since(masks / name) < written}
    new, problems, last = [name for name in names if name not in entries], [], time.monotonic()
    described = map_in_processes(partial(describe_label_map, masks), new, num_processes)
    for name, described_or_problem in tqdm(described, total=len(new), desc="Label maps", disable=not new):
        if isinstance(described_or_problem, MaskEntry):
            entries[name] = described_or_problem
        else:
            problems.append(described_or_problem)
        if time.monotonic() - last > SECONDS_BETWEEN_WRITES:
            write_entries(candidates, [entries[name] for name in names if name in entries])
            last = time.monotonic()
    if entries:
        write_entries(candidates, [entries[name] for name in names if name in entries])
    if problems:
        raise ValueError(f"{len(problems)} of {len(names)} files are not usable; correct or move them: {problems}")


def describe_label_map(masks: Path, name: str) -> tuple[str, MaskEntry | str]:
    """The name of a label map, and its entry or else what is wrong with it."""
    try:
        safe_name(name)
        image = to_ras(load_label_map(whole_numbers(load_volume(masks / name))))
    except (ValueError, OSError, ImageFileError) as error:
        return name, f"{name}: {error}"
    labels = labels_present(np.asarray(image.dataobj))
    try:
        top, bottom = (one_hot(region) for region in regions_from_labels(labels))
    except ValueError:  # no label tells
        top = bottom = None
    spacing = tuple(round(mm, 4) for mm in spacing_of(image))
    return name, MaskEntry(name, image.shape, spacing, tuple(labels), top, bottom)


def in_place_since(path: Path) -> float:
    """When a file was written or, with an older date, put where it is."""
    stat = path.stat()
    return max(stat.st_mtime, stat.st_ctime)


def whole_numbers(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """A label map that was saved as floating-point numbers, in integers; left alone where they are no whole ones."""
    data = np.asanyarray(image.dataobj)
    if data.dtype.kind != "f" or not all(np.array_equal(plane, np.rint(plane)) for plane in data):
        return image
    return nib.Nifti1Image(data.astype(np.int32), image.affine)


def write_entries(candidates: Path, entries: Iterable[MaskEntry]) -> None:
    """Write the list of a database, in the published layout."""
    content = [{key: value for key, value in asdict(entry).items() if value is not None} for entry in entries]
    with write_atomically(candidates) as temporary:
        temporary.write_text("[" + ",\n ".join(json.dumps(item) for item in content) + "]\n")
