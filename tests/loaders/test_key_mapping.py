"""Every weight of the published networks has its place, at their real size and without allocating any."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DDPMScheduler

from maisi_diffusers import (
    AutoencoderKLMaisi,
    MaisiControlNetModel,
    MaisiRFlowScheduler,
    MaisiUNet3DConditionModel,
)
from maisi_diffusers.loaders.architecture import read_architecture
from maisi_diffusers.loaders.key_mapping import unet_source_keys, vae_source_keys
from maisi_diffusers.models.attention_maisi import MaisiAttention
from tests.parity import monai_reference
from tests.parity.monai_reference import PUBLISHED, VERSIONS, build_networks, network_config

CLASSES = {
    "vae": AutoencoderKLMaisi,
    "unet": MaisiUNet3DConditionModel,
    "controlnet": MaisiControlNetModel,
    "mask_vae": AutoencoderKLMaisi,
    "mask_unet": MaisiUNet3DConditionModel,
}


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def published_shapes(version):
    """The shape of every weight of MONAI's networks, by network and key."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(monai_reference, "randomize", lambda network, seed: network)
        networks = build_networks(version, PUBLISHED)
    return {
        name: {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
        for name, network in networks.items()
    }


def make_models(folder, version, with_configuration):
    if with_configuration:
        (folder / "configs").mkdir()
        path = folder / "configs" / f"config_network_{version.removesuffix('-ct')}.json"
        path.write_text(json.dumps(network_config(version, PUBLISHED)))
    architecture = read_architecture(folder, version.removesuffix("-ct"))
    with init_empty_weights():
        return architecture, {name: CLASSES[name](**architecture[name]) for name in CLASSES}


@pytest.mark.parametrize("with_configuration", [False, True], ids=["released", "configuration"])
@pytest.mark.parametrize("name", CLASSES)
def test_complete_and_one_to_one(tmp_path, version, published_shapes, name, with_configuration):
    _, models = make_models(tmp_path, version, with_configuration)
    layers = {"vae": (2, 2, 2), "mask_vae": (1, 2, 2)}
    sources = {}
    for own_name, weight in models[name].state_dict().items():
        assert weight.is_meta
        keys = vae_source_keys(own_name, layers[name]) if name in layers else unet_source_keys(own_name)
        for key in keys:
            assert key not in sources, f"{key} is the source of two weights"
            sources[key] = (weight.shape[0] // len(keys), *weight.shape[1:])
    assert sources == published_shapes[name]


def test_sizes_are_the_published_ones(published_shapes):
    """So that a mistake in the reference can't make the comparison empty."""
    megaweights = {
        name: sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6
        for name, shapes in published_shapes.items()
    }
    assert megaweights["unet"] > 150 and megaweights["mask_unet"] > 150 and megaweights["controlnet"] > 50
    assert megaweights["vae"] > 15 and 3 < megaweights["mask_vae"] < megaweights["vae"]


def test_released_architecture_is_that_of_the_configuration(tmp_path, version):
    (tmp_path / "with").mkdir()
    released, released_models = make_models(tmp_path, version, False)
    configured, configured_models = make_models(tmp_path / "with", version, True)
    for name, model in released_models.items():
        other = configured_models[name]
        assert repr(model) == repr(other)
        assert [(m.heads, m.upcast_attention) for m in model.modules() if isinstance(m, MaisiAttention)] == [
            (m.heads, m.upcast_attention) for m in other.modules() if isinstance(m, MaisiAttention)
        ]
    for name in ("vae", "mask_vae"):
        assert released_models[name].config.scaling_factor == configured_models[name].config.scaling_factor
    assert released["mask_scheduler"] == configured["mask_scheduler"]


def test_released_scheduler_is_that_of_the_configuration(tmp_path, version):
    (tmp_path / "with").mkdir()
    scheduler_class = MaisiRFlowScheduler if version == "rflow-ct" else DDPMScheduler
    released, configured = (
        scheduler_class(**make_models(folder, version, with_configuration)[0]["scheduler"]).config
        for folder, with_configuration in ((tmp_path, False), (tmp_path / "with", True))
    )
    assert {**released, "_use_default_values": None} == {**configured, "_use_default_values": None}
