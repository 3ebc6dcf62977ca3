"""Label maps on the wanted grid: those that have it, or the nearest."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from maisi_diffusers import MaisiMaskDatabase
from maisi_diffusers.anatomy import mask_database
from maisi_diffusers.imaging import spacing_of
from tests.mask_databases import make_database, make_entry, make_mask, one_hot
from tests.tiny import SIZE, SPACING, seeded

GRID = {"output_size": SIZE, "spacing": SPACING}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return MaisiMaskDatabase(make_database(tmp_path_factory.mktemp("database")))


def names(found) -> list[str]:
    return [mask.entry.pseudo_label_filename.removesuffix(".nii.gz") for mask in found]


def test_those_with_the_grid_come_first_and_as_they_are(database):
    for seed in range(4):
        (mask,) = database.find(1, seeded(seed), anatomy_list=["pancreatic tumor"], **GRID)
        assert names([mask]) == ["abdomen/pancreas"]  # the other one has another spacing
        assert np.array_equal(mask.image.dataobj, database.load(mask.entry).dataobj)
        assert mask.labels == {1, 4, 24, 200} and mask.regions == (2, 2)


def test_too_few_of_them_and_the_nearest_is_resampled(database):
    found = database.find(2, seeded(), anatomy_list=["pancreatic tumor"], **GRID)
    assert names(found) == ["abdomen/pancreas", "abdomen/pancreas too"]
    resampled = found[1].image
    assert resampled.shape == SIZE and np.allclose(spacing_of(resampled), SPACING)
    assert found[1].labels == set(np.unique(resampled.dataobj)) - {0} >= {24}
    assert found[1].regions == (2, 2)  # read off the result; of the whole it is abdomen to pelvis
    # Fewer than are wanted: again from the first.
    assert names(database.find(3, seeded(), anatomy_list=[24], **GRID))[2] == "abdomen/pancreas"


def test_cropped_and_padded_about_the_middle(database):
    grid = {"output_size": (16, 24, 32), "spacing": SPACING}
    (mask,) = database.find(1, seeded(), anatomy_list=["pancreatic tumor"], body_region=["abdomen"], **grid)
    whole = np.asarray(database.load(mask.entry).dataobj)
    found = np.asarray(mask.image.dataobj)
    assert names([mask]) == ["abdomen/pancreas"]
    assert np.array_equal(found[:, 4:-4], whole[4:-4]) and not found[:, :4].any() and not found[:, -4:].any()


def test_equally_near_ones_are_chosen_at_random(database):
    grid = {"output_size": (24, 16, 40), "spacing": SPACING}
    chosen = {names(database.find(1, seeded(seed), body_region=["chest"], **grid))[0] for seed in range(12)}
    assert chosen == {"chest/healthy", "torso"}  # not the one whose size is another
    first, again = (names(database.find(4, seeded(1), body_region=["chest"], **grid)) for _ in range(2))
    assert first == again and first[2] == "chest/large"


@pytest.fixture
def loaded(database, monkeypatch):
    """What is loaded of a database of lungs, all alike but that every other one has none after all."""
    entries = [replace(database.entries[0], pseudo_label_filename=f"{i}.nii.gz") for i in range(40)]
    loaded = []

    def load(entry):
        loaded.append(entry)
        return make_mask([28, 200] if entries.index(entry) % 2 else [200], SIZE, SPACING)

    monkeypatch.setattr(database, "entries", entries)
    monkeypatch.setattr(database, "load", load)
    return loaded


def test_a_generator_for_each(database, loaded):
    """Finds what it finds alone, whatever is passed over for the others, and leaves it the same noise."""

    def find(*seeds):
        generators = [seeded(seed) for seed in seeds]
        found = names(database.find(len(seeds), generators, anatomy_list=[28], **GRID))
        return [(name, torch.rand(1, generator=one).item()) for name, one in zip(found, generators)]

    alone = [*find(0), *find(1), *find(2), *find(0)]
    assert len(loaded) > len(alone)  # some were passed over
    loaded.clear()
    assert find(0, 1, 2, 0) == alone and len(loaded) == len(set(loaded))


def test_what_is_loaded_for_one_image_stays_its_own(database, loaded):
    """Of the volumes no more are read, and kept, than are chosen or passed over."""
    found = database.find(4, seeded(), anatomy_list=[28], **GRID)
    assert len({*names(found)}) == 4
    usable = [entry for entry in loaded if database.entries.index(entry) % 2]
    assert usable == [mask.entry for mask in found] and len(loaded) > len(found)


def test_one_that_loses_what_was_asked_for_is_passed_over(tmp_path):
    folder = make_database(tmp_path)
    content = json.loads((folder / "candidate_masks.json").read_text())
    # Its tumor is where the wanted field of view does not reach.
    mask = make_mask([1, 4, 24, 200], SIZE, SPACING)
    labels = np.asarray(mask.dataobj).copy()
    labels[labels == 24] = 200
    labels[4, 4, 31] = 24
    name = "abdomen/pancreas.nii.gz"
    type(mask)(labels, mask.affine).to_filename(folder / "masks" / name)
    database = MaisiMaskDatabase(folder)
    grid = {"output_size": (24, 16, 24), "spacing": SPACING}
    (found,) = database.find(1, seeded(), anatomy_list=["pancreatic tumor"], **grid)
    assert names([found]) == ["abdomen/pancreas too"]

    content = [item for item in content if item["pseudo_label_filename"].endswith(name)]
    (folder / "candidate_masks.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"none of 1 label maps has what was asked .*they are without pancreatic tumor \(1\); give a"
    ):
        MaisiMaskDatabase(folder).find(1, seeded(), anatomy_list=["pancreatic tumor"], **grid)


def test_one_that_loses_the_region_is_passed_over(tmp_path):
    """The head of a whole body is not in the middle of it."""
    folder = make_database(tmp_path)
    whole_body = make_mask([22, 28, 1, 3, 4, 93, 200], (24, 16, 64), SPACING)
    whole_body.to_filename(folder / "masks" / "torso.nii.gz")
    content = make_entry("torso") | {"dim": [24, 16, 64], "label_list": [1, 3, 4, 22, 28, 93, 200]}
    (folder / "candidate_masks.json").write_text(json.dumps([content]))
    grid = {"output_size": (24, 16, 24), "spacing": SPACING}
    assert MaisiMaskDatabase(folder).find(1, seeded(), body_region=["abdomen"], **grid)
    with pytest.raises(ValueError, match=r"they are without the region \(1\); give a larger field"):
        MaisiMaskDatabase(folder).find(1, seeded(), body_region=["head"], **grid)


def test_too_large_a_target(database):
    wanted = {"output_size": (24, 16, 160), "spacing": SPACING}
    with pytest.raises(ValueError) as error:
        database.find(1, seeded(), body_region=["chest"], **wanted)
    assert "is large enough for output_size=(24, 16, 160)" in str(error.value)
    assert "the nearest have output_size=(24, 16, 32)" in str(error.value)
    wanted["output_size"] = (24, 16, 159)  # 128 voxels may be missing
    (mask,) = database.find(1, seeded(), body_region=["chest"], **wanted)
    assert mask.image.shape == (24, 16, 159)


def test_tumors_not_asked_for_do_not_come_with_the_nearest(database):
    for mask in database.find(8, seeded(), output_size=(20, 16, 32), spacing=SPACING):
        assert not mask.labels & {23, 24, 26, 27, 128}


@pytest.mark.parametrize(
    ("listed", "reason"),
    [([1, 4, 23, 200], "without lung tumor"), ([1, 4, 200], "with pancreatic tumor that is not in the list")],
)
def test_one_that_is_not_what_the_list_says_is_passed_over(tmp_path, listed, reason):
    """Whatever else it says of other labels, which nobody asked for."""
    wanted = ["lung tumor"] if 23 in listed else ["pancreas"]
    folder = make_database(tmp_path)
    content = json.loads((folder / "candidate_masks.json").read_text())
    wrong = make_entry("abdomen/pancreas") | {"label_list": [*listed, 3]}  # no spleen there, and it does not matter
    others = [one for one in content if one["pseudo_label_filename"] != wrong["pseudo_label_filename"]]
    (folder / "candidate_masks.json").write_text(json.dumps([wrong, *others]))
    for seed in range(3):
        (found,) = MaisiMaskDatabase(folder).find(1, seeded(seed), anatomy_list=wanted, **GRID)
        assert names([found]) == [{"lung tumor": "chest/tumor", "pancreas": "abdomen/healthy"}[wanted[0]]]

    (folder / "candidate_masks.json").write_text(json.dumps([wrong]))
    with pytest.raises(ValueError, match=f"{reason} "):
        MaisiMaskDatabase(folder).find(1, seeded(), anatomy_list=wanted, **GRID)


def test_the_search_ends(database, monkeypatch):
    """Where thousands lose what was asked for, not all of them are read."""
    monkeypatch.setattr(mask_database, "MAX_LOADED", 2)
    loaded = []
    monkeypatch.setattr(database, "load", lambda entry: loaded.append(entry) or make_mask([200], SIZE, SPACING))
    with pytest.raises(ValueError, match="none of 2 label maps has what was asked for"):
        database.find(1, seeded(), body_region=["chest"], anatomy_list=["heart"], **GRID)
    assert len(loaded) == 2


def test_spacings_that_are_alike_up_to_rounding_are_chosen_at_random(database, monkeypatch):
    """512 voxels make a tenth of a millimetre of what is a difference of 0.0003 mm."""
    spacings = (0.684, 0.684, 0.6843, 0.6837)
    entries = [replace(database.entries[0], dim=(512, 512, 512), spacing=(mm,) * 3) for mm in spacings]
    monkeypatch.setattr(database, "entries", entries)
    monkeypatch.setattr(database, "load", lambda entry: make_mask([28, 200], SIZE, SPACING))
    grid = {"output_size": (512, 512, 512), "spacing": (0.684,) * 3}
    chosen = {database.find(1, seeded(seed), body_region=["chest"], **grid)[0].entry for seed in range(24)}
    assert chosen == set(entries)


@pytest.mark.parametrize(("num", "generators"), [(0, None), (-1, None), (3, 1), (1, 2)])
def test_wrong_numbers(database, num, generators):
    generator = None if generators is None else [seeded()] * generators
    with pytest.raises(ValueError, match=f"num={num}.* is not allowed: give 1 or more, and one generator or one for"):
        database.find(num, generator, **GRID)


def test_a_request_that_can_be_read_once(database):
    (found,) = database.find(1, seeded(), anatomy_list=(name for name in ["pancreatic tumor"]), **GRID)
    assert 24 in found.labels


def test_region_of_what_no_label_tells(tmp_path):
    """A crop of a chest that shows no lung is still one of a chest, by its entry."""
    folder = tmp_path / "database"
    (folder / "masks" / "chest").mkdir(parents=True)
    entry = make_entry("chest/healthy")
    mask = make_mask([28, 115, 200], SIZE, SPACING)
    mask.to_filename(folder / "masks" / "chest" / "healthy.nii.gz")
    (folder / "candidate_masks.json").write_text(json.dumps([entry | {"top_region_index": one_hot(1)}]))
    (found,) = MaisiMaskDatabase(folder).find(1, seeded(), output_size=(24, 16, 8), spacing=SPACING)
    assert 28 not in found.labels and found.regions == (1, 1)
