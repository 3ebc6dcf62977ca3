"""Label maps that the pipeline looks up, anatomy sizes that it completes, and the quality of what it made."""

import json
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from maisi_diffusers import MaisiCTPipeline, MaisiMaskDatabase, MaisiMaskPipeline
from maisi_diffusers.anatomy import LABELS
from maisi_diffusers.pipelines.anatomy_files import AnatomyFiles
from tests.mask_databases import FINE, LARGE, MASKS, make_database, make_mask
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded

GRID = {"output_size": SIZE, "spacing": SPACING}
ROWS = [[0.5] * 5 + [-1.0] * 5, [0.2, 0.9, 0.3, 0.4, 0.5] + [-1.0] * 2 + [0.6, -1.0, -1.0]]
CONDITIONS = [{"organ_size": row} for row in ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = make_pipeline("rflow-ct")
    pipe.mask_database = MaisiMaskDatabase(folder)
    return pipe


def looked_up(labels: np.ndarray | nib.Nifti1Image) -> str:
    """Which label map of the database it is."""
    array = np.asarray(getattr(labels, "dataobj", labels))
    found = [
        name
        for name, (indices, size, spacing, _) in MASKS.items()
        if size == array.shape and np.array_equal(make_mask(indices, size, spacing).dataobj, array)
    ]
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def masks_only(monkeypatch):
    """The pipelines end before sampling, with the label maps and what the UNet would take."""
    calls = []
    prepare = MaisiCTPipeline.prepare_conditions

    class PreparedError(Exception):
        pass

    def stop(pipe, *args):
        calls.append((args[4], prepare(pipe, *args)))
        raise PreparedError

    monkeypatch.setattr(MaisiCTPipeline, "prepare_conditions", stop)

    def call(pipe, **kwargs):
        with pytest.raises(PreparedError):
            pipe(**kwargs)
        return calls[-1]

    return call


def test_looked_up_label_map(pipe):
    request = {"body_region": ["chest"], "anatomy_list": ["lung tumor"], **GRID}
    output = pipe(**request, augment_mask=False, generator=seeded())
    image, labels = output.images[0], output.labels[0]
    assert looked_up(labels) == "chest/tumor"
    assert image.get_data_dtype() == np.int16 and labels.get_data_dtype() == np.uint8
    for nifti in (image, labels):
        np.testing.assert_allclose(nifti.affine, np.diag([*SPACING, 1]))
        assert "synthetic" in nifti.header["descrip"].item().decode()
    hu = image.get_fdata()
    outside = np.asarray(labels.dataobj) == 0
    assert (hu[outside] == -1000).all() and hu[~outside].std() > 10

    # The image is the one that this label map gives.
    generator = seeded()
    pipe.mask_database.select(pipe.mask_database.search(anatomy_list=["lung tumor"]), 1, generator)
    mask = make_mask(MASKS["chest/tumor"][0], SIZE, SPACING)
    again = pipe(mask=mask, generator=generator)
    np.testing.assert_array_equal(again.images[0].dataobj, image.dataobj)


def test_a_variant_of_a_looked_up_label_map(pipe, masks_only):
    request = {"anatomy_list": ["hepatic tumor"], "body_region": ["abdomen"], **GRID}
    maps = []
    for seed, kwargs in ((0, {}), (0, {}), (1, {}), (0, {"augment_mask": False})):
        label_maps, _ = masks_only(pipe, **request, **kwargs, generator=seeded(seed))
        maps.append(np.asarray(label_maps[0].dataobj))
        assert 26 in maps[-1]
    first, same, other, as_it_is = maps
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert looked_up(as_it_is) == "abdomen/liver"
    assert set(as_it_is[first != as_it_is]) <= {1, 26, 200}


def test_a_tumor_that_cannot_move(pipe, masks_only):
    """A slab of lung tumor between others than lung."""
    with pytest.warns(UserWarning, match="lung tumor stays where it is in 'chest/tumor.nii.gz': in 60 tries"):
        label_maps, _ = masks_only(pipe, anatomy_list=["lung tumor"], **GRID, generator=seeded())
    assert looked_up(label_maps[0]) == "chest/tumor"


def test_the_nearest_label_map(pipe, masks_only):
    label_maps, conditions = masks_only(pipe, body_region=["chest"], output_size=(24, 24, 32), spacing=SPACING)
    assert label_maps[0].shape == (24, 24, 32) and conditions["spacing"].tolist() == [[200, 200, 300]]
    assert 28 in np.asarray(label_maps[0].dataobj)


def test_region_alone(pipe):
    names = {
        looked_up(pipe(body_region=["abdomen"], **GRID, num_inference_steps=1, generator=seeded(i)).labels[0])
        for i in range(8)
    }
    assert names <= {"abdomen/healthy", "abdomen/healthy too", "torso"} and len(names) > 1


def test_several_images(pipe):
    arguments = {"body_region": ["abdomen"], **GRID, "num_images": 3, "output_type": "np"}
    first = pipe(**arguments, generator=seeded(1))
    names = [looked_up(labels) for labels in first.labels]
    assert sorted(names) == ["abdomen/healthy", "abdomen/healthy too", "torso"]
    again = pipe(**arguments, generator=seeded(1))
    assert np.array_equal(first.labels, again.labels) and np.array_equal(first.images, again.images)
    outside = first.labels == 0
    assert (first.images[outside] == -1000).all()


def test_more_images_than_label_maps(pipe, masks_only):
    label_maps, _ = masks_only(pipe, anatomy_list=["lung tumor"], **GRID, num_images=3, augment_mask=False)
    assert [looked_up(labels) for labels in label_maps] == ["chest/tumor"] * 3


def test_a_generator_an_image(pipe):
    arguments = {"body_region": ["abdomen"], **GRID, "output_type": "np"}
    together = pipe(**arguments, num_images=2, generator=[seeded(0), seeded(3)])
    names = [looked_up(labels) for labels in together.labels]
    for i, seed in enumerate((0, 3)):
        alone = pipe(**arguments, generator=[seeded(seed)])
        assert looked_up(alone.labels[0]) == names[i]
        np.testing.assert_allclose(together.images[i], alone.images[0], atol=2)


def test_regions_are_those_of_the_label_map(folder, masks_only):
    """Not those that were asked for: these must only lie between them."""
    pipe = make_pipeline("ddpm-ct")
    pipe.mask_database = MaisiMaskDatabase(folder)

    def regions(**kwargs):
        _, conditions = masks_only(pipe, **kwargs)
        return [conditions[f"{end}_region_index"].argmax(dim=1).tolist() for end in ("top", "bottom")]

    fine = {"output_size": SIZE, "spacing": FINE}
    assert regions(body_region=["abdomen"], anatomy_list=["pancreatic tumor"], **fine) == [[2], [3]]
    assert regions(body_region=["abdomen"], anatomy_list=["left femur"], **GRID) == [[1], [3]]
    assert regions(anatomy_list=["lung tumor"], **GRID, num_images=2) == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="tells the body region"):
        pipe.mask_database.entries = [entry for entry in pipe.mask_database.entries if "heart" in str(entry)]
        pipe(anatomy_list=["heart"], **GRID)


def test_default_grid(folder, masks_only):
    pipe = make_pipeline("rflow-ct")
    pipe.mask_database = MaisiMaskDatabase(folder)
    with pytest.raises(
        ValueError, match=r"is large enough for output_size=\(512, 512, 512\) with spacing=\(1, 1, 1\); the"
    ):
        pipe(body_region=["chest"])
    pipe.register_to_config(default_output_size=list(SIZE), default_spacing=list(SPACING))
    as_it_is = {"augment_mask": False}
    label_maps, conditions = masks_only(pipe, anatomy_list=["lung tumor"], **as_it_is)
    assert looked_up(label_maps[0]) == "chest/tumor" and conditions["spacing"].tolist() == [[200, 200, 300]]
    label_maps, _ = masks_only(pipe, output_size=LARGE, spacing=SPACING, body_region=["chest"], **as_it_is)
    assert looked_up(label_maps[0]) == "chest/large"
    label_maps, _ = masks_only(pipe, output_size=SIZE, spacing=FINE, anatomy_list=["pancreatic tumor"], **as_it_is)
    assert looked_up(label_maps[0]) == "abdomen/pancreas too"
    _, conditions = masks_only(pipe, image_only=True)
    assert conditions["spacing"].tolist() == [[200, 200, 300]]


def test_mask_of_the_user_has_its_own_grid(masks_only):
    pipe = make_pipeline("rflow-ct")
    pipe.register_to_config(default_output_size=[64, 64, 64], default_spacing=[1.0, 1.0, 1.0])
    label_maps, _ = masks_only(pipe, mask=make_label_map())
    assert label_maps[0].shape == SIZE


def test_classes_of_a_fine_tuned_model(folder, tmp_path, masks_only):
    """A tumor that only this model knows is one too: not there unless asked for."""
    content = json.loads((folder / "candidate_masks.json").read_text())
    names = [entry["pseudo_label_filename"] for entry in content]
    for name, labels in (("heart", [115, 129]), ("chest/healthy", [28, 129, 200])):
        content[names.index(f"./{name}.nii.gz")]["label_list"] = labels
        shutil.copytree(folder / "masks", tmp_path / "masks", dirs_exist_ok=True)
    for name, labels in (("heart", [115, 129, 200]), ("chest/healthy", [28, 129, 200])):
        make_mask(labels, SIZE, SPACING).to_filename(tmp_path / "masks" / f"{name}.nii.gz")
    (tmp_path / "candidate_masks.json").write_text(json.dumps(content))
    pipe = make_pipeline("rflow-ct")
    pipe.mask_database = MaisiMaskDatabase(tmp_path)
    arguments = {"body_region": ["chest"], **GRID}
    names = {str(np.unique(masks_only(pipe, **arguments, generator=seeded(i))[0][0].dataobj)) for i in range(8)}
    assert any("129" in name for name in names)

    pipe.controlnet.add_classes({"heart tumor": 129}, {"heart tumor": ["heart"]})
    for i in range(8):
        assert looked_up(masks_only(pipe, **arguments, generator=seeded(i))[0][0]) == "torso"
    label_maps, _ = masks_only(pipe, **arguments, anatomy_list=["heart tumor"])
    assert 129 in np.unique(label_maps[0].dataobj)


def test_body_is_added_where_a_label_map_has_none(tmp_path, masks_only):
    make_database(tmp_path)
    labels = np.asarray(make_mask([28, 115, 200], SIZE, SPACING).dataobj)
    nib.Nifti1Image(np.where(labels == 200, 0, labels).astype(np.uint8), np.diag([*SPACING, 1.0])).to_filename(
        tmp_path / "masks" / "chest" / "healthy.nii.gz"
    )
    pipe = make_pipeline("rflow-ct")
    pipe.mask_database = MaisiMaskDatabase(tmp_path)
    pipe.mask_database.entries = pipe.mask_database.entries[:1]
    with pytest.warns(UserWarning, match="is a guess"):
        label_maps, _ = masks_only(pipe, body_region=["chest"], **GRID)
    assert 200 in np.unique(label_maps[0].dataobj)


def sizes_of_generated(pipe, monkeypatch, **kwargs) -> list[float]:
    """What the mask UNet is told."""
    given = []
    forward = pipe.mask_unet.forward
    monkeypatch.setattr(
        pipe.mask_unet, "forward", lambda *a, **k: given.append(k["encoder_hidden_states"]) or forward(*a, **k)
    )
    pipe(**kwargs, **GRID, num_inference_steps=1, generator=seeded())
    return given[0][0, 0].tolist()


def test_anatomy_sizes_are_completed(monkeypatch):
    pipe = make_pipeline("rflow-ct")
    sizes = {"controllable_anatomy_size": [("liver", 0.75), ("hepatic tumor", 0.25)]}
    given = [-1.0, 0.75] + [-1.0] * 5 + [0.25, -1.0, -1.0]
    assert pipe.anatomy_size_conditions is None
    assert sizes_of_generated(pipe, monkeypatch, **sizes) == given

    pipe.anatomy_size_conditions = ROWS
    completed = [0.2, 0.75, 0.3, 0.4, 0.5, -1, -1, 0.25, -1, -1]
    assert sizes_of_generated(pipe, monkeypatch, **sizes) == pytest.approx(completed)
    assert sizes_of_generated(pipe, monkeypatch, anatomy_size=given) == given  # the whole vector is left alone


def test_what_completes_the_sizes_was_not_asked_for(monkeypatch):
    """The report says so, and no warning names it."""
    labels = np.zeros((16, 16, 16), dtype=np.uint8)
    labels[1:15, 1:15, 1:15] = LABELS["body"]
    labels[1:4, 1:4, 1:4], labels[12:15, 12:15, 12:15] = LABELS["liver"], LABELS["pancreas"]  # in the corners
    monkeypatch.setattr(MaisiMaskPipeline, "decode", lambda *_: torch.from_numpy(labels.copy())[None, None])
    pipe = make_pipeline("rflow-ct")
    pipe.anatomy_size_conditions = ROWS
    sizes = [("liver", 0.75), ("stomach", 0.3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, (report,) = pipe.generate_masks(sizes, None, 1, seeded(), (8, 8, 8), (6.0, 6.0, 6.0))
    messages = [str(one.message) for one in caught if one.category is UserWarning]
    assert len(messages) == 2
    assert "has no stomach, which was asked for" in messages[0]
    assert "was made with liver, which is not on the grid" in messages[1]
    ml = 27 * 6**3 / 1000
    assert report["anatomy"] == {
        "gallbladder": {"completed": 0.2, "ml": 0},
        "liver": {"asked": 0.75, "ml": pytest.approx(ml, abs=0.01)},
        "stomach": {"asked": 0.3, "ml": 0},
        "pancreas": {"completed": 0.4, "ml": pytest.approx(ml, abs=0.01)},
        "colon": {"completed": 0.5, "ml": 0},
    }
    with pytest.warns(UserWarning, match="no gallbladder and no stomach and no colon, which was asked for"):
        MaisiMaskPipeline.from_pipe(pipe)(anatomy_size=ROWS[0], anatomy_size_conditions=ROWS)  # named all ten


@pytest.mark.parametrize("wrong", [5, [], [[0.5] * 9], [[0.5] * 9 + [2.0]], [5]])
def test_anatomy_sizes_that_are_none(wrong):
    pipe = make_pipeline("rflow-ct")
    with pytest.raises(ValueError, match="not allowed|must be 10 numbers") as error:
        pipe.anatomy_size_conditions = wrong
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="mask_database='path' is not allowed: give MaisiMaskDatabase"):
        pipe.mask_database = "path"


def test_quality(pipe):
    output = pipe(anatomy_list=["lung tumor"], **GRID, generator=seeded(), output_type="np")
    image, labels = output.images[0], output.labels[0]
    pipe = make_pipeline("rflow-ct")
    pipe.register_to_config(quality_thresholds=None)  # those of the published training data
    report = pipe.check_quality(image, labels)
    assert set(report["organs"]) == {"lung"} and report == json.loads(json.dumps(report))
    assert pipe.check_quality(image, labels, modality="t1") is None
    median = report["organs"]["lung"]["median"]
    own = make_pipeline("rflow-ct")
    own.register_to_config(quality_thresholds={"lung": [median, median], "heart": [5000, 6000]})
    report = own.check_quality(image, labels)
    assert report["organs"]["lung"]["passed"] and not report["organs"]["heart"]["passed"] and not report["passed"]


# -- in a repository


def add_anatomy_files(repository: Path, zipped: bool = False) -> None:
    make_database(repository / "mask_database", zipped=zipped, in_folder="all_masks")
    (repository / "mask_database" / "anatomy_size_conditions.json").write_text(json.dumps(CONDITIONS))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A saved pipeline without a database."""
    folder = tmp_path_factory.mktemp("repository")
    make_pipeline("rflow-ct").save_pretrained(folder)
    return folder


@pytest.fixture
def own_repository(repository, tmp_path):
    """A copy of its own for a test."""
    return Path(shutil.copytree(repository, tmp_path / "repository"))


def check_complete(pipe: MaisiCTPipeline) -> None:
    assert len(pipe.mask_database) == len(MASKS) and pipe.anatomy_size_conditions == ROWS
    entry = pipe.mask_database.search(anatomy_list=["lung tumor"])[0]
    assert looked_up(pipe.mask_database.load(entry)) == "chest/tumor"


def test_repository_without(repository):
    assert not (repository / "mask_database").exists()
    pipe = MaisiCTPipeline.from_pretrained(repository)
    assert pipe.mask_database is None and pipe.anatomy_size_conditions is None
    with pytest.raises(ValueError, match="this model no mask database"):
        pipe(body_region=["chest"], **GRID)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("loader", [MaisiCTPipeline, DiffusionPipeline])
def test_round_trip(own_repository, tmp_path, zipped, loader):
    add_anatomy_files(own_repository, zipped)
    pipe = loader.from_pretrained(own_repository)
    pipe.save_pretrained(tmp_path / "copy")  # before anything was read
    shutil.rmtree(own_repository)
    pipe = loader.from_pretrained(tmp_path / "copy")
    check_complete(pipe)
    pipe.save_pretrained(tmp_path / "copy")  # in its own place
    check_complete(loader.from_pretrained(tmp_path / "copy"))
    names = {path.name for path in (tmp_path / "copy" / "mask_database").iterdir()}
    assert names == {"candidate_masks.json", "anatomy_size_conditions.json", "masks.zip" if zipped else "masks"}
    assert not [path for path in (tmp_path / "copy").iterdir() if path.name.startswith(".")]
    assert "mask_database" not in (tmp_path / "copy" / "model_index.json").read_text()


def test_config_values_travel(tmp_path):
    pipe = make_pipeline("rflow-ct")
    values = {
        "default_output_size": [24, 16, 32],
        "default_spacing": [2.0, 2.0, 3.0],
        "quality_thresholds": {"liver": [0, 100]},
    }
    assert not any(pipe.config[name] for name in values)
    pipe.register_to_config(**values)
    pipe.save_pretrained(tmp_path)
    again = MaisiCTPipeline.from_pretrained(tmp_path)
    assert {name: again.config[name] for name in values} == values


def test_what_is_set_is_saved(folder, own_repository, tmp_path):
    pipe = MaisiCTPipeline.from_pretrained(own_repository)
    pipe.mask_database = MaisiMaskDatabase(folder)
    pipe.save_pretrained(tmp_path / "copy")
    again = MaisiCTPipeline.from_pretrained(tmp_path / "copy")
    assert again.mask_database.entries == pipe.mask_database.entries and again.anatomy_size_conditions is None
    again.anatomy_size_conditions = ROWS
    again.save_pretrained(tmp_path / "copy")
    check_complete(MaisiCTPipeline.from_pretrained(tmp_path / "copy"))
    again.mask_database = None
    again.save_pretrained(tmp_path / "copy")
    again = MaisiCTPipeline.from_pretrained(tmp_path / "copy")
    assert again.mask_database is None and again.anatomy_size_conditions == ROWS


def test_saved_in_the_place_of_another_model(own_repository):
    """Whose label maps and sizes are not this one's."""
    add_anatomy_files(own_repository)
    make_pipeline("rflow-ct").save_pretrained(own_repository)
    assert not [path for path in own_repository.iterdir() if "mask_database" in path.name]
    pipe = MaisiCTPipeline.from_pretrained(own_repository)
    assert pipe.mask_database is None and pipe.anatomy_size_conditions is None


def test_from_pipe(folder, own_repository):
    add_anatomy_files(own_repository)
    pipe = MaisiCTPipeline.from_pretrained(own_repository)
    other = MaisiCTPipeline.from_pipe(pipe)
    check_complete(other)
    other.mask_database = None
    check_complete(pipe)
    pipe = make_pipeline("rflow-ct")
    pipe.mask_database = MaisiMaskDatabase(folder)
    assert MaisiCTPipeline.from_pipe(pipe).mask_database is pipe.mask_database


def test_saving_that_fails_leaves_what_was_there(own_repository, tmp_path):
    add_anatomy_files(own_repository)
    target = Path(shutil.copytree(own_repository, tmp_path / "target"))
    before = sorted(target.rglob("*"))
    pipe = MaisiCTPipeline.from_pretrained(own_repository)
    (own_repository / "mask_database" / "masks" / "torso.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="torso.nii.gz.*to save without.*pipe.mask_database = None") as error:
        pipe.save_pretrained(target)
    assert "\n" not in str(error.value) and sorted(target.rglob("*")) == before
    check_complete(MaisiCTPipeline.from_pretrained(target))
    pipe.mask_database = None
    pipe.save_pretrained(target)
    assert not (target / "mask_database" / "masks").exists()


def test_from_another_working_directory(own_repository, monkeypatch, tmp_path):
    add_anatomy_files(own_repository)
    monkeypatch.chdir(own_repository.parent)
    pipe = MaisiCTPipeline.from_pretrained(own_repository.name)
    monkeypatch.chdir(tmp_path.parent)
    check_complete(pipe)


BROKEN = {
    "candidate_masks.json": ("mask_database", "[{}]"),
    "anatomy_size_conditions.json": ("anatomy_size_conditions", '{"organ_size": []}'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(own_repository, name):
    attribute, content = BROKEN[name]
    add_anatomy_files(own_repository)
    (own_repository / "mask_database" / name).write_text(content)
    pipe = MaisiCTPipeline.from_pretrained(own_repository)
    for _ in range(2):
        with pytest.raises(ValueError, match=name) as error:
            getattr(pipe, attribute)
        assert "\n" not in str(error.value)


def test_masks_that_are_not_there(own_repository):
    add_anatomy_files(own_repository)
    shutil.rmtree(own_repository / "mask_database" / "masks")
    pipe = MaisiCTPipeline.from_pretrained(own_repository)
    with pytest.raises(FileNotFoundError, match="No folder and no .zip .*masks.zip'; download it"):
        pipe(body_region=["chest"], **GRID)


def test_no_repository():
    files = AnatomyFiles()
    assert files.mask_database is None and files.size_conditions is None
