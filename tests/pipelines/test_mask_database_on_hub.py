"""Mask databases and anatomy sizes in repositories on the Hub, which is a server on this machine here, and in the
published layout: what is downloaded, and when."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from maisi_diffusers import MaisiCTPipeline
from tests.hub_server import HubServer, process_on
from tests.mask_databases import MASKS, make_database
from tests.parity.monai_reference import SIZES, build_networks, network_config, save_checkpoint
from tests.tiny import SIZE, SPACING, make_pipeline, seeded

FILES, ZIP, WITHOUT, PUBLISHED = "owner/files", "owner/zip", "owner/without", "nvidia/NV-Generate-CT"
ROWS = [[0.5] * 5 + [-1.0] * 5]
LIST = "mask_database/candidate_masks.json"
CONDITIONS = "mask_database/anatomy_size_conditions.json"


def write_conditions(path: Path) -> None:
    path.write_text(json.dumps([{"organ_size": row} for row in ROWS]))


def make_published(folder: Path) -> Path:
    """Both CT models, their mask database and anatomy sizes, in the published layout."""
    size = SIZES["two levels"]
    for i, version in enumerate(("rflow-ct", "ddpm-ct")):
        part = folder.parent / version
        save_checkpoint(part, version, build_networks(version, size), network_config(version, size))
        shutil.copytree(part, folder, dirs_exist_ok=True)
        shutil.rmtree(part)
        make_database(folder / "datasets", zipped=True, in_folder="all_masks_flexible_size_and_spacing_4000")
        name = f"candidate_masks_flexible_size_and_spacing_{4000 - 1000 * i}.json"
        entries = json.loads((folder / "datasets" / "candidate_masks.json").read_text())
        (folder / "datasets" / name).write_text(json.dumps(entries[i:]))
        (folder / "datasets" / "candidate_masks.json").unlink()
    datasets = folder / "datasets"
    (datasets / "masks.zip").rename(datasets / "all_masks_flexible_size_and_spacing_4000.zip")
    write_conditions(datasets / "all_anatomy_size_conditions.json")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub") / "root"
    for repo in (FILES, ZIP, WITHOUT):
        make_pipeline("rflow-ct").save_pretrained(root / repo)
    for repo in (FILES, ZIP):
        make_database(root / repo / "mask_database", zipped=repo == ZIP)
        write_conditions(root / repo / CONDITIONS)
    make_published(root / PUBLISHED)
    hub = HubServer(root, tags={FILES: {"v1"}})
    yield hub
    hub.stop()
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def process(hub, tmp_path_factory):
    with process_on(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.fixture
def downloads(hub):
    """The files that were sent since the last look, or the last question."""

    def take() -> set[str]:
        taken = {path for _, path in hub.downloads}
        hub.downloads.clear()
        return taken

    take()
    return take


_LOADED = {}


def run(action: str, class_name: str, source: str, options: dict, *arguments):
    """Do something with a pipeline, in the process that knows the server; returns the error if there is one."""
    import diffusers

    import maisi_diffusers

    key = (class_name, source, *sorted(options.items()))
    try:
        if key not in _LOADED:
            if "version" in options:
                _LOADED[key] = MaisiCTPipeline.from_maisi_checkpoint(source, **options)
            else:
                loader = getattr(maisi_diffusers if class_name.startswith("Maisi") else diffusers, class_name)
                _LOADED[key] = loader.from_pretrained(source, **options)
            _LOADED[key].set_progress_bar_config(disable=True)
        return ACTIONS[action](_LOADED[key], *arguments)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def generate(pipe, **kwargs) -> np.ndarray:
    pipe.register_to_config(input_rules=None)
    return pipe(
        **kwargs, output_size=SIZE, spacing=SPACING, num_inference_steps=1, generator=seeded(), output_type="np"
    ).labels


ACTIONS = {
    "load": lambda pipe: None,
    "look up": lambda pipe: np.unique(generate(pipe, body_region=["chest"], anatomy_list=["lung tumor"])).tolist(),
    "look up nothing": lambda pipe: generate(pipe, anatomy_list=["prostate"]),
    "sizes": lambda pipe: pipe.anatomy_size_conditions,
    "database": lambda pipe: None if pipe.mask_database is None else len(pipe.mask_database),
    "where": lambda pipe: vars(pipe.anatomy_files.repository),
    "save": lambda pipe, folder: pipe.save_pretrained(folder),
}


@pytest.mark.parametrize("class_name", ["MaisiCTPipeline", "DiffusionPipeline"])
@pytest.mark.parametrize("repo", [FILES, ZIP])
def test_only_what_is_needed_when_it_is_needed(hub, process, tmp_path, downloads, class_name, repo):
    def do(action, *arguments):
        return process.submit(run, action, class_name, repo, {"cache_dir": str(tmp_path)}, *arguments).result()

    assert do("load") is None
    assert not any(path.startswith("mask_database") for path in downloads())
    assert do("sizes") == ROWS and downloads() == {CONDITIONS}
    assert "no label map with prostate" in do("look up nothing") and downloads() == {LIST}
    masks = "mask_database/masks/chest/tumor.nii.gz" if repo == FILES else "mask_database/masks.zip"
    assert do("look up") == [0, 23, 28, 115, 200] and downloads() == {masks}
    with hub.paused():
        assert do("look up") == [0, 23, 28, 115, 200]
    # The cache that the networks are in, at their commit.
    where = do("where")
    assert where["revision"] == hub.commit(repo) and Path(where["cache_dir"]) == tmp_path
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith("models")} == {
        f"models--{repo.replace('/', '--')}"
    }

    assert do("save", str(tmp_path / "saved")) is None
    saved = MaisiCTPipeline.from_pretrained(tmp_path / "saved")
    assert len(saved.mask_database) == len(MASKS) and saved.anatomy_size_conditions == ROWS
    for entry in saved.mask_database.entries:
        assert saved.mask_database.load(entry).shape == entry.dim


@pytest.mark.slow
def test_two_processes_that_open_the_same_zip_at_once(hub, process, tmp_path, downloads):
    """The archive is downloaded once, and both read it."""
    options = {"cache_dir": str(tmp_path / "cache")}
    with process_on(hub, tmp_path / "home") as other:
        for one in (process, other):
            one.submit(run, "load", "MaisiCTPipeline", ZIP, options).result()
        downloads()
        both = [one.submit(run, "look up", "MaisiCTPipeline", ZIP, options) for one in (process, other)]
        assert [one.result() for one in both] == [[0, 23, 28, 115, 200]] * 2
    archives = [path for _, path in hub.downloads if path.endswith(".zip")]
    assert archives == ["mask_database/masks.zip"]
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("class_name", ["MaisiCTPipeline", "DiffusionPipeline"])
def test_repository_without(hub, process, tmp_path, downloads, class_name):
    options = {"cache_dir": str(tmp_path)}
    process.submit(run, "load", class_name, WITHOUT, options).result()
    downloads()
    with hub.paused():  # known from the list of its files
        assert process.submit(run, "database", class_name, WITHOUT, options).result() is None
        assert process.submit(run, "sizes", class_name, WITHOUT, options).result() is None
        assert process.submit(run, "save", class_name, WITHOUT, options, str(tmp_path / "saved")).result() is None
    assert not downloads() and not (tmp_path / "saved" / "mask_database").exists()


def test_what_cannot_be_downloaded(hub, process, tmp_path):
    options = {"cache_dir": str(tmp_path)}
    process.submit(run, "load", "MaisiCTPipeline", FILES, options).result()
    with hub.paused():
        for action in ("look up", "sizes", "database", "save"):
            arguments = [str(tmp_path / "saved")] if action == "save" else []
            error = process.submit(run, action, "MaisiCTPipeline", FILES, options, *arguments).result()
            assert error.startswith("FileNotFoundError") and repr(FILES) in error and "network" in error, error
            assert "\n" not in error
    assert "pipe.mask_database = None" in error and not (tmp_path / "saved").exists()
    assert process.submit(run, "sizes", "MaisiCTPipeline", FILES, options).result() == ROWS  # with the Hub again


def test_options_of_the_hub(process, tmp_path):
    options = {"cache_dir": str(tmp_path), "revision": "v1", "token": "secret"}
    where = process.submit(run, "where", "MaisiCTPipeline", FILES, options).result()
    assert where["token"] == "secret" and len(where["revision"]) == 40
    options = {"cache_dir": str(tmp_path), "local_files_only": True, "revision": "v1"}
    error = process.submit(run, "sizes", "MaisiCTPipeline", FILES, options).result()
    assert error.startswith("FileNotFoundError")  # it is not in the cache, and the Hub is not asked


@pytest.mark.parametrize(("version", "number"), [("rflow-ct", 4000), ("ddpm-ct", 3000)])
def test_published_on_the_hub(hub, process, tmp_path, downloads, version, number):
    options = {"cache_dir": str(tmp_path), "version": version}

    def do(action, *arguments):
        return process.submit(run, action, "", PUBLISHED, options, *arguments).result()

    assert do("load") is None and not any(path.startswith("datasets") for path in downloads())
    assert do("database") == len(MASKS) - (number == 3000)
    assert downloads() == {f"datasets/candidate_masks_flexible_size_and_spacing_{number}.json"}
    assert do("sizes") == ROWS and downloads() == {"datasets/all_anatomy_size_conditions.json"}
    assert do("look up") == [0, 23, 28, 115, 200]
    assert downloads() == {"datasets/all_masks_flexible_size_and_spacing_4000.zip"}


def test_published_on_a_hub_whose_main_moves(hub, process, tmp_path):
    """List and label maps are those of the commit that the networks came from, and the Hub is not asked again."""
    repo, version = "owner/moving", "rflow-ct"
    options = {"cache_dir": str(tmp_path / "cache"), "version": version}

    def do(action, *arguments):
        return process.submit(run, action, "", repo, options, *arguments).result()

    shutil.copytree(hub.root / PUBLISHED, hub.root / repo, copy_function=os.link)
    assert do("load") is None
    commit = hub.commit(repo)
    hub.former[commit] = hub.root.parent / "former"
    (hub.root / repo).rename(hub.former[commit])
    shutil.copytree(hub.former[commit], hub.root / repo, ignore=shutil.ignore_patterns("*.json", "*.zip"))
    assert hub.commit(repo) != commit

    assert do("database") == len(MASKS) and do("where")["revision"] == commit
    assert do("look up") == [0, 23, 28, 115, 200] and do("sizes") == ROWS
    requests = hub.requests
    assert do("look up") == [0, 23, 28, 115, 200] and hub.requests == requests


@pytest.mark.parametrize("unpacked", [False, True])
def test_published_in_a_folder(hub, tmp_path, unpacked):
    source = Path(shutil.copytree(hub.root / PUBLISHED, tmp_path / "published"))
    archive = source / "datasets" / "all_masks_flexible_size_and_spacing_4000.zip"
    if unpacked:
        shutil.unpack_archive(archive, source / "datasets")
        archive.unlink()
    pipe = MaisiCTPipeline.from_maisi_checkpoint(source, version="rflow-ct")
    assert len(pipe.mask_database) == len(MASKS) and pipe.anatomy_size_conditions == ROWS

    pipe.save_pretrained(tmp_path / "converted")
    shutil.rmtree(source)
    converted = MaisiCTPipeline.from_pretrained(tmp_path / "converted")
    assert len(converted.mask_database) == len(MASKS) and converted.anatomy_size_conditions == ROWS
    converted.set_progress_bar_config(disable=True)
    labels = generate(converted, body_region=["chest"], anatomy_list=["lung tumor"])
    assert np.unique(labels).tolist() == [0, 23, 28, 115, 200]


def test_published_without_datasets(hub, tmp_path):
    source = Path(
        shutil.copytree(hub.root / PUBLISHED, tmp_path / "published", ignore=shutil.ignore_patterns("datasets"))
    )
    pipe = MaisiCTPipeline.from_maisi_checkpoint(source, version="rflow-ct")
    assert pipe.mask_database is None and pipe.anatomy_size_conditions is None
    pipe.save_pretrained(tmp_path / "converted")
    assert not (tmp_path / "converted" / "mask_database").exists()
