"""A converted checkpoint, uploaded as it is: what it makes is what it makes from its folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from maisi_diffusers.cli.convert import main
from tests.hub_server import HubServer, process_on
from tests.parity.monai_reference import SIZES, build_networks, network_config, save_checkpoint
from tests.tiny import make_label_map, seeded

REPO = "owner/converted"
COMPONENTS = ("vae", "unet", "controlnet", "mask_vae", "mask_unet", "scheduler", "mask_scheduler")
# The half-precision weights compute in float32 here: in float16 a CPU takes minutes.
VARIANTS = {"float32": {}, "fp16": {"variant": "fp16", "dtype": torch.float32}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """With weights of both precisions in one repository."""
    folder = tmp_path_factory.mktemp("hub")
    size = SIZES["two levels"]
    networks = build_networks("rflow-ct", size)
    checkpoint = save_checkpoint(folder / "checkpoint", "rflow-ct", networks, network_config("rflow-ct", size))
    repository, half = folder / "root" / REPO, folder / "half"
    for output, options in ((repository, []), (half, ["--dtype", "float16", "--variant", "fp16"])):
        main([str(checkpoint), str(output), "--version", "rflow-ct", *options])
    for path in half.rglob("*.safetensors"):
        shutil.copy(path, repository / path.relative_to(half))
    hub = HubServer(folder / "root")
    yield hub
    hub.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    yield home
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def process(hub, home):
    with process_on(hub, home) as process:
        yield process


def make_volume(class_name: str, source: str, **kwargs) -> tuple[str, np.ndarray, np.ndarray]:
    """The class of the loaded pipeline, an image and its labels."""
    import diffusers

    import maisi_diffusers

    loader = getattr(maisi_diffusers if class_name.startswith("Maisi") else diffusers, class_name)
    pipe = loader.from_pretrained(source, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(input_rules=None)  # the released ones want volumes too large for a test
    output = pipe(mask=make_label_map(), num_inference_steps=2, generator=seeded(), output_type="np")
    return type(pipe).__name__, output.images, output.labels


@pytest.fixture(scope="module")
def local(hub):
    """What the folder makes, by precision."""
    folder = str(hub.root / REPO)
    return {name: make_volume("MaisiCTPipeline", folder, **kwargs) for name, kwargs in VARIANTS.items()}


def test_precisions_differ(local):
    (_, image, labels), (_, half_image, half_labels) = local["float32"], local["fp16"]
    assert image.std() > 10 and not np.array_equal(image, half_image)
    assert np.array_equal(labels, half_labels) and len(np.unique(labels)) > 3
    assert np.abs(image - half_image).mean() < 20


@pytest.mark.parametrize("precision", VARIANTS)
@pytest.mark.parametrize("class_name", ["MaisiCTPipeline", "DiffusionPipeline"])
def test_same_images(hub, process, local, tmp_path, class_name, precision):
    hub.downloads.clear()
    name, image, labels = process.submit(
        make_volume, class_name, REPO, cache_dir=tmp_path, **VARIANTS[precision]
    ).result()
    _, expected_image, expected_labels = local[precision]
    assert name == "MaisiCTPipeline"
    assert np.array_equal(image, expected_image) and np.array_equal(labels, expected_labels)

    suffix = ".fp16.safetensors" if precision == "fp16" else ".safetensors"
    weights = {path for _, path in hub.downloads if path.endswith(".safetensors")}
    assert weights == {f"{name}/diffusion_pytorch_model{suffix}" for name in COMPONENTS[:5]}
    others = {path for _, path in hub.downloads} - weights
    assert "model_index.json" in others and len(others) == 1 + len(COMPONENTS)

    hub.downloads.clear()
    with hub.paused():
        arguments = {"cache_dir": tmp_path, "local_files_only": True, **VARIANTS[precision]}
        again = process.submit(make_volume, class_name, REPO, **arguments).result()
    assert np.array_equal(again[1], expected_image) and hub.downloads == []


def download(source, **kwargs):
    from diffusers import DiffusionPipeline

    import maisi_diffusers  # noqa: F401, makes the pipeline known

    return DiffusionPipeline.download(source, **kwargs)


def test_download(hub, process, tmp_path):
    folder = Path(process.submit(download, REPO, cache_dir=tmp_path, variant="fp16").result())
    weights = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    assert weights == sorted(f"{name}/diffusion_pytorch_model.fp16.safetensors" for name in COMPONENTS[:5])


def raised(class_name, source, **kwargs):
    try:
        make_volume(class_name, source, **kwargs)
    except (OSError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("class_name", ["MaisiCTPipeline", "DiffusionPipeline"])
def test_no_such_repository(process, tmp_path, class_name):
    message = process.submit(raised, class_name, "nobody/nothing", cache_dir=tmp_path).result()
    assert message is not None and "nobody/nothing" in message
