"""Label maps on the wanted grid: those that have it, or the nearest."""

import json

import numpy as np
import pytest

from maisi_diffusers import MaisiMaskDatabase
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


def test_a_generator_for_each(database):
    grid = {"output_size": (24, 16, 40), "spacing": SPACING}
    alone = [names(database.find(1, [seeded(seed)], body_region=["chest"], **grid))[0] for seed in (3, 4)]
    together = names(database.find(2, [seeded(3), seeded(4)], body_region=["chest"], **grid))
    assert together[0] == alone[0]


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
        ValueError, match=r"keeps what was asked for .*they lose pancreatic tumor \(1\); give a larger"
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
    with pytest.raises(ValueError, match=r"keeps what was asked for .*they lose the region \(1\); give a larger"):
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
