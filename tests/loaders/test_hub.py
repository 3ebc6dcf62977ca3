"""Published checkpoints from the Hub, which is a server on this machine here."""

import errno
import os
import shutil
from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, XetDownloadError

from maisi_diffusers.loaders import Repository, repository
from tests.hub_server import HubServer, process_on
from tests.parity.monai_reference import SCALE_FACTOR

from .checkpoints import CONFIG, FILES

CT, BRAIN = "nvidia/NV-Generate-CT", "nvidia/NV-Generate-MR-Brain"
BRAIN_UNET = "models/diff_unet_3d_rflow-mr-brain_v1.pt"


@pytest.fixture(scope="module")
def hub(tmp_path_factory, published):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(published, root / CT, copy_function=os.link)
    for name in (
        "README.md",
        "configs/config_network_ddpm.json",
        "models/diff_unet_3d_ddpm-ct.pt",
        "models/autoencoder_v2.pt",
        "datasets/all_masks_flexible_size_and_spacing_4000.zip",
    ):
        (root / CT / name).parent.mkdir(exist_ok=True)
        (root / CT / name).write_text("not needed")
    for name, source in ((BRAIN_UNET, FILES["unet"]), (CONFIG, CONFIG)):
        (root / BRAIN / name).parent.mkdir(parents=True)
        os.link(published / source, root / BRAIN / name)
    (root / BRAIN / "models" / "autoencoder_v1.pt").write_text("another VAE")
    hub = HubServer(root, tags={BRAIN: {"v1.0"}})
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def process(hub, tmp_path_factory):
    with process_on(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


def load(source, version, **kwargs):
    """What a pipeline has, or the error, from the process that knows the server."""
    from maisi_diffusers import MaisiCTPipeline

    try:
        pipe = MaisiCTPipeline.from_maisi_checkpoint(source, version=version, **kwargs)
    except (OSError, ValueError) as error:
        return type(error).__name__, str(error)
    models = {name: component for name, component in pipe.components.items() if hasattr(component, "num_parameters")}
    return {name: model.num_parameters() for name, model in models.items()}, pipe.vae.config.scaling_factor


@pytest.fixture
def downloads(hub):
    hub.downloads.clear()
    return hub.downloads


def test_only_the_needed_files(hub, process, tmp_path, downloads):
    sizes, scaling_factor = process.submit(load, CT, "rflow-ct", cache_dir=tmp_path).result()
    assert set(sizes) == set(FILES) and scaling_factor == torch.tensor(SCALE_FACTOR).item()
    assert sorted(downloads) == sorted((CT, name) for name in (*FILES.values(), CONFIG))

    downloads.clear()
    assert process.submit(load, CT, "rflow-ct", cache_dir=tmp_path).result() == (sizes, scaling_factor)
    assert downloads == []


def test_mr_brain_takes_the_vae_of_ct(process, tmp_path, downloads):
    sizes, _ = process.submit(load, BRAIN, "rflow-mr-brain", cache_dir=tmp_path).result()
    assert set(sizes) == {"vae", "unet"}
    assert sorted(downloads) == sorted([(BRAIN, BRAIN_UNET), (BRAIN, CONFIG), (CT, FILES["vae"])])


def test_revision_is_of_the_source_alone(process, tmp_path, downloads):
    sizes, _ = process.submit(load, BRAIN, "rflow-mr-brain", cache_dir=tmp_path, revision="v1.0").result()
    assert set(sizes) == {"vae", "unet"}
    error, message = process.submit(load, BRAIN, "rflow-mr-brain", cache_dir=tmp_path, revision="v2.0").result()
    assert error == "FileNotFoundError" and "revision='v2.0'" in message and "\n" not in message


@pytest.mark.parametrize(("source", "version"), [(CT, "rflow-ct"), (BRAIN, "rflow-mr-brain")])
def test_from_the_cache(hub, process, tmp_path, source, version):
    loaded = process.submit(load, source, version, cache_dir=tmp_path).result()
    with hub.paused():
        assert process.submit(load, source, version, cache_dir=tmp_path, local_files_only=True).result() == loaded
        assert process.submit(load, source, version, cache_dir=tmp_path).result() == loaded


def test_what_is_not_in_the_cache(hub, process, tmp_path):
    with hub.paused():
        for options in ({}, {"local_files_only": True}):
            error, message = process.submit(load, CT, "rflow-ct", cache_dir=tmp_path, **options).result()
            assert error == "FileNotFoundError" and repr(CT) in message and "network" in message
            assert "\n" not in message


def test_a_download_that_is_cut_off(hub, process, tmp_path, downloads):
    hub.cut_off.add(FILES["vae"])
    error, message = process.submit(load, CT, "rflow-ct", cache_dir=tmp_path).result()
    assert error == "FileNotFoundError" and repr(CT) in message and "ReadError" in message and "network" in message
    assert "\n" not in message
    hub.cut_off.clear()
    sizes, _ = process.submit(load, CT, "rflow-ct", cache_dir=tmp_path).result()
    assert set(sizes) == set(FILES)
    assert sorted(downloads) == sorted((CT, name) for name in (*FILES.values(), CONFIG))  # none again


@pytest.mark.parametrize("error", [HTTPError("of a proxy"), XetDownloadError(), RuntimeError(), ConnectionError()])
def test_what_else_a_download_can_end_in(monkeypatch, error):
    monkeypatch.setattr(repository, "snapshot_download", mock.Mock(side_effect=error))
    message = f"'{CT}' .* \\({type(error).__name__}\\): check name, network and proxy"
    with pytest.raises(FileNotFoundError, match=message):
        Repository(CT).fetch("*")


def test_a_full_disk_is_not_the_network(monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(repository, "snapshot_download", mock.Mock(side_effect=error))
    with pytest.raises(OSError, match="No space left on device") as raised:
        Repository(CT).fetch("*")
    assert raised.value is error


def test_no_such_repository(process, tmp_path):
    error, message = process.submit(load, "nobody/nothing", "rflow-ct", cache_dir=tmp_path).result()
    assert error == "FileNotFoundError" and "\n" not in message
    assert "'nobody/nothing'" in message and "neither a folder nor a Hub repository" in message


def test_repository_of_another_model(process, tmp_path):
    error, message = process.submit(load, BRAIN, "rflow-ct", cache_dir=tmp_path).result()
    assert error == "FileNotFoundError" and FILES["unet"] in message and "version" in message


def test_server_is_like_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    api = HfApi(endpoint=hub.url, token=False)
    info = api.model_info(CT)
    assert info.id == CT and CONFIG in {sibling.rfilename for sibling in info.siblings}
    assert api.model_info(CT, revision=info.sha).sha == info.sha
    path = api.hf_hub_download(CT, CONFIG, cache_dir=tmp_path)
    assert open(path, "rb").read() == (hub.root / CT / CONFIG).read_bytes()
    assert api.file_exists(CT, CONFIG) and not api.file_exists(CT, "missing.json")
    assert api.repo_exists(CT) and not api.repo_exists("nobody/nothing")
