import gzip
import json
import shutil
import stat
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_diffusers import MaisiMaskDatabase
from maisi_diffusers.anatomy import LABELS, TUMORS, mask_files, new_vocabulary
from maisi_diffusers.anatomy.mask_database import grid_distance
from tests.mask_databases import FINE, LARGE, MASKS, make_database, make_entry, make_mask, one_hot
from tests.tiny import SIZE, SPACING, seeded

GRID = {"output_size": SIZE, "spacing": SPACING}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture(scope="module")
def database(folder):
    return MaisiMaskDatabase(folder)


def names(entries) -> list[str]:
    return [entry.pseudo_label_filename.removesuffix(".nii.gz") for entry in entries]


FOUND = {
    "everything without tumors": (
        {},
        ["chest/healthy", "chest/large", "abdomen/healthy", "abdomen/healthy too", "torso", "heart"],
    ),
    "region": ({"body_region": ["chest"]}, ["chest/healthy", "chest/large", "torso"]),
    "region, other word, upper case": ({"body_region": ["Thorax"]}, ["chest/healthy", "chest/large", "torso"]),
    "region in a span": ({"body_region": ["abdomen"]}, ["abdomen/healthy", "abdomen/healthy too", "torso"]),
    "regions": ({"body_region": ["chest", "lower"]}, ["torso"]),
    "label": ({"anatomy_list": ["pancreas"]}, ["abdomen/healthy"]),
    "label by number": ({"anatomy_list": [4]}, ["abdomen/healthy"]),
    "labels": ({"anatomy_list": ["liver", "left lung upper lobe"]}, ["torso"]),
    "tumor": ({"anatomy_list": ["lung tumor"]}, ["chest/tumor"]),
    "tumor and organ": ({"anatomy_list": ["pancreatic tumor", 1]}, ["abdomen/pancreas", "abdomen/pancreas too"]),
    "tumor in a region": (
        {"anatomy_list": ["pancreatic tumor"], "body_region": ["pelvis"]},
        ["abdomen/pancreas too"],
    ),
    "tumor in several regions": ({"anatomy_list": ["hepatic tumor"]}, ["abdomen/liver", "head"]),
    "grid": ({"anatomy_list": ["pancreatic tumor"], **GRID}, ["abdomen/pancreas"]),
    "size": ({"output_size": list(LARGE)}, ["chest/large"]),
    "spacing": ({"anatomy_list": [24], "spacing": FINE}, ["abdomen/pancreas too"]),
    "rounded spacing": ({"anatomy_list": [24], "spacing": (1.5004, 1.4996, 2.0)}, ["abdomen/pancreas too"]),
}


@pytest.mark.parametrize("case", FOUND)
def test_search(database, case):
    requirements, expected = FOUND[case]
    assert names(database.search(**requirements)) == expected


NOT_FOUND = {
    "label": ({"anatomy_list": ["prostate"]}, "with prostate", "each for itself: none", "change anatomy_list"),
    "labels apart": (
        {"anatomy_list": ["lung tumor", "liver"]},
        "with liver and lung tumor",
        "liver (6)",
        "lung tumor (1)",
    ),
    "region of a tumor": (
        {"anatomy_list": ["pancreatic tumor"], "body_region": ["chest"]},
        "with pancreatic tumor shows chest",
        "some of abdomen (1), abdomen to pelvis (1)",
        "change body_region",
    ),
    "region of nowhere": (
        {"anatomy_list": ["heart"], "body_region": ["head"]},
        "shows head",
        "no known region (1)",
    ),
    "regions apart": ({"body_region": ["head", "lower"]}, "shows head and pelvis", "chest (3)", "head (1)"),
    "tumors only": (
        {"body_region": ["head"]},
        "in head is without further tumors",
        "some with hepatic tumor (1)",
        "anatomy_list",
    ),
    "size": (
        {"body_region": ["chest"], "output_size": (16, 16, 16)},
        "in chest has output_size=(16, 16, 16)",
        "output_size=(24, 16, 32) with spacing=(2, 2, 3) (2)",
        "output_size=(32, 32, 32)",
    ),
    "spacing": (
        {"anatomy_list": [24], "output_size": SIZE, "spacing": (1.52, 1.5, 2.0)},
        "has output_size=(24, 16, 32) with spacing=(1.52, 1.5, 2)",
        "spacing=(1.5, 1.5, 2) (1)",
        "give one of these",
    ),
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_nothing_found(database, case):
    requirements, *expected = NOT_FOUND[case]
    with pytest.raises(ValueError) as error:
        database.search(**requirements)
    message = str(error.value)
    assert "\n" not in message and message.startswith("no label map")
    for text in expected:
        assert text in message, message


def test_nearest_grid_comes_first(database):
    entry = dict(zip(MASKS, database.entries))["chest/large"]
    # By hand: field of view 64 x 64 x 96 against 48 x 32 x 96 mm, size 32 x 32 x 32 against 24 x 16 x 32.
    assert grid_distance(entry, SIZE, SPACING) == pytest.approx((16 + 32) / 10 + (8 + 16) / 100)
    assert grid_distance(entry, None, FINE) == pytest.approx((16 + 16 + 32) / 10 + 2.0)
    assert grid_distance(entry, LARGE, SPACING) == grid_distance(entry, None, None) == 0
    with pytest.raises(ValueError, match=r"the nearest have output_size=\(32, 32, 32\)"):
        database.search(body_region=["chest"], output_size=(32, 32, 24))


def test_vocabulary_of_a_fine_tuned_model(database):
    vocabulary = new_vocabulary({"heart tumor": 129})
    with pytest.raises(ValueError, match="heart tumor"):
        database.search(anatomy_list=["heart tumor"], vocabulary=vocabulary)
    with pytest.raises(ValueError, match="No anatomy is called 'heart tumor'"):
        database.search(anatomy_list=["heart tumor"])
    # A label that is a tumor of this model alone.
    assert names(database.search(body_region=["abdomen"], tumors={*TUMORS, LABELS["pancreas"]})) == [
        "abdomen/healthy too",
        "torso",
    ]


def test_selection(database):
    entries = database.search()
    first = database.select(entries, 3, seeded(0))
    assert first == database.select(entries, 3, seeded(0)) and len({*names(first)}) == 3
    assert any(database.select(entries, 3, seeded(seed)) != first for seed in range(1, 4))
    # More than there are: each as often as the others, give or take one.
    many = names(database.select(entries, 2 * len(entries) + 2, seeded(1)))
    assert sorted(many.count(name) for name in names(entries)) == [2] * 4 + [3] * 2
    assert set(many[: len(entries)]) == set(names(entries))
    # All get their turn.
    assert {name for seed in range(40) for name in names(database.select(entries, 1, seeded(seed)))} == set(
        names(entries)
    )


def test_selection_by_a_generator_each(database):
    entries = database.search()
    alone = [database.select(entries, 1, [seeded(seed)])[0] for seed in (0, 1, 0)]
    together = database.select(entries, 3, [seeded(0), seeded(1), seeded(0)])
    assert together == alone and alone[0] != alone[1]
    torch.manual_seed(5)
    without = database.select(entries, 2)
    torch.manual_seed(5)
    assert database.select(entries, 2) == without


@pytest.mark.parametrize("layout", ["folder", "zip", "zip with a folder", "given apart", "function"])
def test_load(tmp_path, layout):
    asked = []
    if layout.startswith("zip"):
        database = MaisiMaskDatabase(make_database(tmp_path, zipped=True, in_folder="all" * layout.endswith("folder")))
    elif layout == "folder":
        database = MaisiMaskDatabase(make_database(tmp_path) / "candidate_masks.json")
    else:
        make_database(tmp_path / "masks", zipped=True)
        (tmp_path / "masks" / "candidate_masks.json").rename(tmp_path / "list.json")
        masks = tmp_path / "masks" / "masks.zip"
        source = masks if layout == "given apart" else lambda pattern: asked.append(pattern) or masks
        database = MaisiMaskDatabase(tmp_path / "list.json", masks=source)
    assert len(database) == len(MASKS) and str(len(MASKS)) in repr(database)
    before = sorted(tmp_path.rglob("*"))
    for name, entry in zip(MASKS, database.entries):
        labels, size, spacing, _ = MASKS[name]
        image = database.load(entry)
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(image.dataobj, make_mask(labels, size, spacing).dataobj)
        np.testing.assert_allclose(image.affine, np.diag([*spacing, 1]))
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked
    if layout == "function":
        assert asked == [f"{name}.nii.gz" for name in MASKS]


def one_mask(folder, image=None, name="a.nii.gz", **fields) -> MaisiMaskDatabase:
    """A database of one label map."""
    (folder / "masks").mkdir(parents=True)
    image = make_mask([1, 24, 200], SIZE, SPACING) if image is None else image
    if isinstance(image, bytes):
        (folder / "masks" / name).write_bytes(image)
    else:
        image.to_filename(folder / "masks" / name)
    entry = {"pseudo_label_filename": name, "dim": SIZE, "spacing": SPACING, "label_list": [1, 24]} | fields
    (folder / "candidate_masks.json").write_text(json.dumps([entry]))
    return MaisiMaskDatabase(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.as_reoriented([[0, -1], [2, 1], [1, 1]]),
        lambda image: nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float32), image.affine),
        lambda image: nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine),
        lambda image: nib.Nifti1Image(np.asarray(image.dataobj).astype(np.int16), image.affine),
    ],
    ids=["other orientation", "floating point", "fourth axis", "int16"],
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_load_what_is_stored_otherwise(tmp_path, change, name):
    mask = make_mask([1, 24, 200], SIZE, SPACING)
    database = one_mask(tmp_path, change(mask), name=name)
    image = database.load(database.entries[0])
    assert image.get_data_dtype() == np.uint8 and nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(image.dataobj, mask.dataobj)


def header_of(size) -> bytes:
    """A label map that says it has this size, and ends after its header."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(size)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return gzip.compress(header.binaryblock + bytes(4))


GOOD = make_mask([1, 24, 200], SIZE, SPACING)
UNUSABLE = {
    "another size": ({"dim": [24, 16, 24]}, "size (24, 16, 32)", "(24, 16, 24)"),
    "axes swapped": ({"dim": [16, 24, 32]}, "in RAS+", "(16, 24, 32)"),
    "another spacing": ({"spacing": [2.0, 2.0, 3.1]}, "(2.0, 2.0, 3.0)", "3.1"),
    "text": ({"image": gzip.compress(b"not a volume")}, "not usable", "download"),
    "empty": ({"image": b""}, "not usable", "download"),
    "cut short": ({"image": gzip.compress(GOOD.to_bytes())[:100]}, "cannot be read", "cut short"),
    "damaged": ({"image": gzip.compress(GOOD.to_bytes())[:-8] + bytes(8)}, "cannot be read", "CRC"),
    "only a header": ({"image": header_of(SIZE)}, "not usable", "Expected"),
    "header of another size": ({"image": header_of((20000, 20000, 20000))}, "(20000, 20000, 20000)", "download"),
    "too large": ({"image": gzip.compress(bytes(10**7))}, "unpacks to more than", "bytes"),
    "not whole": (
        {"image": nib.Nifti1Image(np.asarray(GOOD.dataobj) + np.float32(0.5), GOOD.affine)},
        "floating-point",
        "integers",
    ),
    "not MAISI's": ({"image": nib.Nifti1Image(np.full(SIZE, 150, np.uint8), GOOD.affine)}, "150", "download"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_file(tmp_path, case):
    fields, *expected = UNUSABLE[case]
    database = one_mask(tmp_path, **fields)
    with pytest.raises(ValueError) as error:
        database.load(database.entries[0])
    message = str(error.value)
    assert "\n" not in message and "a.nii.gz" in message
    for text in expected:
        assert text in message, message


def add_member(path, name: str, content: bytes = b"", mode: int = stat.S_IFREG) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = (mode | 0o644) << 16
        archive.writestr(member, content, zipfile.ZIP_DEFLATED)


def declare_size(path, size: int) -> None:
    """Let the first member say in the archive's directory that it unpacks to this size."""
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)


def replace_by_a_bomb(path) -> None:
    path.unlink()
    add_member(path, "chest/healthy.nii.gz", bytes(10**8))


UNSAFE = {
    "above the folder": (lambda path: add_member(path, "../evil.nii.gz"), "'../evil.nii.gz'", "without '..'"),
    "above it further down": (lambda path: add_member(path, "a/../../evil.nii.gz"), "evil.nii.gz", "without '..'"),
    "absolute": (lambda path: add_member(path, "/etc/evil.nii.gz"), "'/etc/evil.nii.gz'", "relative"),
    "a drive": (lambda path: add_member(path, "C:/evil.nii.gz"), "'C:/evil.nii.gz'", "drive"),
    "no name": (lambda path: add_member(path, "."), "'.'", "relative"),
    "backslashes": (lambda path: add_member(path, "..\\evil.nii.gz"), "evil.nii.gz", "backslashes"),
    "symbolic link": (
        lambda path: add_member(path, "evil.nii.gz", b"/etc/passwd", stat.S_IFLNK),
        "'evil.nii.gz'",
        "symbolic link",
    ),
    "unpacks to too much": (replace_by_a_bomb, "'chest/healthy.nii.gz'", "unpacks to more than"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "masks.zip", "cut short"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "masks.zip", "cut short"),
    "no zip": (lambda path: path.write_text("<!DOCTYPE html>"), "masks.zip", "download it again"),
    "empty": (lambda path: path.write_bytes(b""), "masks.zip", "download it again"),
    "damaged": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"\x1f\x8b", b"\x1f\x8c")),
        "chest/healthy.nii.gz",
        "download it again",
    ),
    "encrypted": (
        lambda path: path.write_bytes(
            path.read_bytes().replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
        ),
        "encrypted",
        "chest/healthy.nii.gz",
    ),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_zip(tmp_path, case):
    spoil, *expected = UNSAFE[case]
    database = MaisiMaskDatabase(make_database(tmp_path, zipped=True))
    spoil(tmp_path / "masks.zip")
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(ValueError) as error:
        database.load(database.entries[0])
    message = str(error.value)
    assert "\n" not in message and "masks.zip" in message
    for text in expected:
        assert text in message, message
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_zip_with_an_entry_for_the_folder_itself(tmp_path):
    """As bsdtar writes it."""
    database = MaisiMaskDatabase(make_database(tmp_path, zipped=True))
    add_member(tmp_path / "masks.zip", "./", mode=stat.S_IFDIR)
    assert database.load(database.entries[0]).shape == SIZE


def test_zip_that_is_too_large_as_a_whole(tmp_path, monkeypatch):
    database = MaisiMaskDatabase(make_database(tmp_path, zipped=True))
    declare_size(tmp_path / "masks.zip", 2**32 - 2)
    monkeypatch.setattr(mask_files, "MAX_UNPACKED", 2**32)
    with pytest.raises(ValueError, match="masks.zip' is refused: it unpacks to 4 GiB, more than the 4 GiB"):
        database.load(database.entries[0])


@pytest.mark.parametrize("zipped", [False, True])
def test_missing_file(tmp_path, zipped):
    database = MaisiMaskDatabase(make_database(tmp_path, zipped=zipped))
    if zipped:
        (tmp_path / "masks.zip").unlink()
        with zipfile.ZipFile(tmp_path / "masks.zip", "w"):
            pass
    else:
        shutil.rmtree(tmp_path / "masks" / "chest")
    with pytest.raises(FileNotFoundError, match="has no file 'chest/healthy.nii.gz'; download it again, or take"):
        database.load(database.entries[0])


def test_missing_masks(tmp_path):
    make_database(tmp_path)
    database = MaisiMaskDatabase(tmp_path)
    shutil.rmtree(tmp_path / "masks")
    with pytest.raises(FileNotFoundError, match="No folder and no .zip .*masks'; download it"):
        database.load(database.entries[0])
    with pytest.raises(
        FileNotFoundError, match="neither a folder 'masks' nor a 'masks.zip' nor the label maps beside"
    ):
        MaisiMaskDatabase(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.json'; download it"):
        MaisiMaskDatabase(tmp_path / "missing.json")
    (tmp_path / "candidate_masks.json").rename(tmp_path / "candidate_masks_4000.json")
    with pytest.raises(FileNotFoundError, match="has no 'candidate_masks.json'; .*from_folder.* give the path"):
        MaisiMaskDatabase(tmp_path)


def test_list_that_is_spoiled_otherwise(tmp_path):
    for content in ("", "{", "[]", "{}", "[" * 100_000, '"text"'):
        (tmp_path / "candidate_masks.json").write_text(content)
        with pytest.raises(ValueError, match="candidate_masks.json' (is no JSON file|must be a JSON list)") as error:
            MaisiMaskDatabase(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "candidate_masks.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(ValueError, match="is no JSON file"):
        MaisiMaskDatabase(tmp_path)


WRONG = {
    "no name": ({"pseudo_label_filename": None}, "pseudo_label_filename is None"),
    "another kind of file": ({"pseudo_label_filename": "a.png"}, "'a.png', must be the name of a .nii"),
    "absolute": ({"pseudo_label_filename": "/a.nii.gz"}, "'/a.nii.gz', must be a relative path"),
    "above the folder": ({"pseudo_label_filename": "../a.nii.gz"}, "without '..'"),
    "two axes": ({"dim": [24, 16]}, "dim is [24, 16], must be three whole numbers"),
    "half a voxel": ({"dim": [24, 16, 0.5]}, "dim is [24, 16, 0.5]"),
    "no voxel": ({"dim": [24, 16, 0]}, "dim is [24, 16, 0], must be three whole numbers of voxels, 1 to 4096"),
    "text": ({"dim": ["24", 16, 32]}, "dim is ['24', 16, 32]"),
    "no spacing": ({"spacing": [2, 2, 0]}, "spacing is [2, 2, 0], must be three numbers of mm"),
    "endless": ({"spacing": [2, 2, float("inf")]}, "spacing is [2, 2, inf]"),
    "no number": ({"dim": [24, 16, float("nan")]}, "dim is [24, 16, nan]"),
    "labels": ({"label_list": 1}, "label_list is 1, must be a list"),
    "no label": ({"label_list": [1, 150]}, "label_list is [1, 150], must be a list of labels, 1 to 132 and 200"),
    "region": ({"top_region_index": [0, 1, 1, 0]}, "top_region_index is [0, 1, 1, 0], must be three zeros and a 1"),
    "only one region": ({"bottom_region_index": None}, "must both be there"),
    "upside down": ({"bottom_region_index": one_hot(0)}, "[0, 1, 0, 0] is below"),
    "several": ({"dim": 5, "spacing": "x"}, "dim is 5", "spacing is 'x'"),
    "long": ({"label_list": [150] * 100}, "label_list is [150, 150, ", "..., must"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_entry(tmp_path, case):
    fields, *expected = WRONG[case]
    content = [make_entry("chest/healthy"), make_entry("chest/healthy") | fields]
    (tmp_path / "candidate_masks.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        MaisiMaskDatabase(tmp_path)
    message = str(error.value)
    assert "\n" not in message and "1 of 2 entries" in message and "entry 1: " in message
    for text in expected:
        assert text in message, message


def test_all_wrong_entries_at_once(tmp_path):
    content = (
        [make_entry("heart") | {fields: None} for fields in ("dim", "spacing", "label_list")] + [None, 5] + [{}] * 20
    )
    (tmp_path / "candidate_masks.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        MaisiMaskDatabase(tmp_path)
    message = str(error.value)
    assert "25 of 25 entries" in message and message.endswith("; 5 more")
    for text in (
        "entry 0: dim",
        "entry 1: spacing",
        "entry 2: label_list",
        "entry 3: None",
        "entry 4: 5",
        "entry 19: ",
    ):
        assert text in message


def test_numbers_as_numpy_writes_them(tmp_path):
    database = one_mask(
        tmp_path, dim=[24.0, 16.0, 32.0], spacing=[-2.0, -2.0, 3.0], label_list=[0.0, 24.0, 1.0, 1.0], extra="ignored"
    )
    entry = database.entries[0]
    assert entry.dim == SIZE and entry.spacing == SPACING and entry.label_list == (1, 24)
    assert database.load(entry).shape == SIZE


@pytest.mark.parametrize("zipped", [False, True])
def test_save(tmp_path, zipped):
    database = MaisiMaskDatabase(make_database(tmp_path / "original", zipped=zipped))
    database.save(tmp_path / "copy")
    shutil.rmtree(tmp_path / "original")
    copy = MaisiMaskDatabase(tmp_path / "copy")
    assert copy.entries == database.entries
    for entry in copy.entries:
        assert copy.load(entry).shape == entry.dim


def test_save_some_of_it(tmp_path):
    database = MaisiMaskDatabase(make_database(tmp_path / "original"))
    database.entries = database.entries[::-1][:2]
    database.save(tmp_path / "copy")
    assert MaisiMaskDatabase(tmp_path / "copy").entries == database.entries


def test_save_what_is_incomplete(tmp_path):
    database = MaisiMaskDatabase(make_database(tmp_path / "original"))
    (tmp_path / "original" / "masks" / "torso.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="torso.nii.gz"):
        database.save(tmp_path / "copy")
    assert not (tmp_path / "copy" / "candidate_masks.json").exists()  # the list comes last
