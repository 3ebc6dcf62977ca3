"""A database of anyone's label maps."""

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers import MaisiMaskDatabase
from maisi_diffusers.anatomy import mask_index
from tests.mask_databases import MASKS, make_mask

NAMES = ("chest/tumor", "abdomen/healthy", "heart")


@pytest.fixture
def folder(tmp_path):
    """A folder of label maps, one of them turned and one in floating-point numbers, beside what is none."""
    for name in NAMES:
        labels, size, spacing, _ = MASKS[name]
        mask = make_mask(labels, size, spacing)
        if name == "heart":
            mask = mask.as_reoriented(nib.orientations.axcodes2ornt("SLP"))
        if name == "chest/tumor":
            mask = nib.Nifti1Image(mask.get_fdata(dtype=np.float32), mask.affine)
        path = tmp_path / "own" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.to_filename(path)
    (tmp_path / "own" / "notes.txt").write_text("no label map")
    return tmp_path / "own"


@pytest.fixture
def read(monkeypatch):
    """Names of the label maps that have been read."""
    names, describe = [], mask_index.describe_label_map

    def record(masks, name):
        names.append(name)
        return describe(masks, name)

    monkeypatch.setattr(mask_index, "describe_label_map", record)
    return names


@pytest.mark.parametrize("num_processes", [1, 2])
def test_entries_say_what_the_files_have(folder, num_processes):
    database = MaisiMaskDatabase.from_folder(folder, num_processes)
    entries = {entry.pseudo_label_filename: entry for entry in database.entries}
    assert list(entries) == sorted(f"{name}.nii.gz" for name in NAMES)
    for name in NAMES:
        labels, size, spacing, regions = MASKS[name]
        entry = entries[f"{name}.nii.gz"]
        assert (entry.dim, entry.spacing, list(entry.label_list)) == (size, spacing, labels)
        assert entry.regions == (None if name == "heart" else regions or (2, 2))
        assert database.load(entry).shape == size  # which checks the entry against the file
    found = database.search(body_region=["chest"], anatomy_list=["lung tumor"])
    assert [entry.pseudo_label_filename for entry in found] == ["chest/tumor.nii.gz"]


def test_label_maps_in_masks(folder):
    masks = folder.parent / "database" / "masks"
    masks.parent.mkdir()
    folder.rename(masks)
    (masks.parent / "ct.nii.gz").write_bytes(b"a CT, not a label map")
    assert len(MaisiMaskDatabase.from_folder(masks.parent)) == len(MaisiMaskDatabase(masks.parent)) == len(NAMES)


def test_what_is_in_the_list_is_not_read_again(folder, read):
    MaisiMaskDatabase.from_folder(folder)
    assert sorted(read) == sorted(f"{name}.nii.gz" for name in NAMES)
    read.clear()
    first = (folder / "candidate_masks.json").read_text()

    labels, size, spacing, _ = MASKS["abdomen/liver"]
    make_mask(labels, size, spacing).to_filename(folder / "later.nii.gz")
    (folder / "heart.nii.gz").unlink()
    later = (folder / "candidate_masks.json").stat().st_mtime + 10
    os.utime(folder / "chest/tumor.nii.gz", (later, later))
    database = MaisiMaskDatabase.from_folder(folder)
    assert sorted(read) == ["chest/tumor.nii.gz", "later.nii.gz"]
    assert [entry.pseudo_label_filename for entry in database.entries] == [
        "abdomen/healthy.nii.gz",
        "chest/tumor.nii.gz",
        "later.nii.gz",
    ]
    kept = [item for item in json.loads(first) if item["pseudo_label_filename"] == "abdomen/healthy.nii.gz"]
    assert kept[0] in json.loads((folder / "candidate_masks.json").read_text())


def test_a_label_map_with_an_older_date_is_read(folder, read):
    """As one is that was copied with its date, over another."""
    MaisiMaskDatabase.from_folder(folder)
    read.clear()
    labels, size, spacing, _ = MASKS["abdomen/liver"]
    make_mask(labels, size, spacing).to_filename(folder / "heart.nii.gz")
    os.utime(folder / "heart.nii.gz", (1e9, 1e9))
    entries = {entry.pseudo_label_filename: entry for entry in MaisiMaskDatabase.from_folder(folder).entries}
    assert read == ["heart.nii.gz"] and list(entries["heart.nii.gz"].label_list) == labels


def test_the_list_is_written_as_far_as_it_is(folder, read, monkeypatch):
    monkeypatch.setattr(mask_index, "SECONDS_BETWEEN_WRITES", 0.0)
    describe = mask_index.describe_label_map

    def interrupted(masks, name):
        if len(read) == 2:
            raise KeyboardInterrupt
        return describe(masks, name)

    monkeypatch.setattr(mask_index, "describe_label_map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MaisiMaskDatabase.from_folder(folder)
    assert len(MaisiMaskDatabase(folder)) == len(read) == 2
    read.clear()
    monkeypatch.setattr(mask_index, "describe_label_map", describe)
    assert len(MaisiMaskDatabase.from_folder(folder)) == 3
    assert len(read) == 1


def test_unusable_files_are_named_and_the_others_listed(folder):
    nib.Nifti1Image(np.full((4, 4, 4), 140, np.uint8), np.eye(4)).to_filename(folder / "unknown.nii.gz")
    (folder / "damaged.nii.gz").write_bytes(b"\x1f\x8bnot gzip")
    shutil.copyfile(next(folder.rglob("*.nii.gz")), folder / "c\\d.nii.gz")  # the list is for all systems
    with pytest.raises(ValueError, match="3 of 6 files") as error:
        MaisiMaskDatabase.from_folder(folder)
    assert "without '..' and backslashes" in str(error.value)
    assert "unknown.nii.gz" in str(error.value) and "140" in str(error.value) and "damaged" in str(error.value)
    assert len(MaisiMaskDatabase(folder)) == 3


def test_nothing_to_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder"):
        MaisiMaskDatabase.from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no .nii or .nii.gz"):
        MaisiMaskDatabase.from_folder(tmp_path)
    assert not list(tmp_path.iterdir())
