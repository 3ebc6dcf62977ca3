"""Configurations and weights survive the disk, in every form that diffusers writes them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from .networks import DENOISERS, KINDS, build, inputs, output, with_dtype

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def files(folder):
    return {path.name for path in folder.iterdir()}


def settings(model):
    """A configuration with tuples as lists, as JSON has them, without diffusers' notes."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return json.loads(json.dumps(config))


def test_config_round_trip(kind):
    model = build(kind)
    for config in (model.config, json.loads(model.to_json_string())):
        twin = type(model).from_config(config)
        assert settings(twin) == settings(model)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(output(twin.eval(), inputs(kind)), output(model, inputs(kind)))


def test_config_names_every_argument(kind):
    model = build(kind)
    assert set(settings(model)) == model._get_init_keys(type(model)) - {"self"}


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("name", ["layers_per_block", "attention_levels", "attention_head_dim"])
def test_one_value_a_level_or_one_for_all(kind, name):
    value = {"layers_per_block": 2, "attention_levels": True, "attention_head_dim": 16}[name]
    one, each = build(kind, **{name: value}), build(kind, **{name: [value, value]})
    assert torch.equal(output(one, inputs(kind)), output(each, inputs(kind)))
    with pytest.raises(ValueError, match=f"`{name}`.* 3 entries.* 2 levels"):
        build(kind, **{name: [value] * 3})


def test_saved_model_is_the_same(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == {CONFIG, WEIGHTS}

    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not loaded.training
    assert settings(loaded) == settings(model)
    assert torch.equal(output(loaded, inputs(kind)), output(model, inputs(kind)))


def test_shards(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size=model.get_memory_footprint() // 3)
    shards = {name for name in files(tmp_path) if name.endswith(".safetensors")}
    assert len(shards) >= 3
    assert files(tmp_path) == {CONFIG, f"{WEIGHTS}.index.json", *shards}

    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert set(index["weight_map"].values()) == shards

    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(loaded, inputs(kind)), output(model, inputs(kind)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(kind, dtype, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype)), name

    if dtype == torch.bfloat16:  # convolutions in float16 are slow on a CPU
        arguments = with_dtype(inputs(kind), dtype)
        result = output(loaded, arguments)
        assert result.dtype == dtype
        assert torch.equal(result, output(model.to(dtype), arguments))


@pytest.mark.parametrize("shards", [1, 3])
def test_variant(kind, shards, tmp_path):
    model = build(kind).half()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=model.get_memory_footprint() // shards + 1)
    weights = files(tmp_path) - {CONFIG}
    if shards == 1:
        assert weights == {"diffusion_pytorch_model.fp16.safetensors"}
        assert {weight.dtype for weight in load_file(tmp_path / weights.pop()).values()} == {torch.float16}
    else:
        assert len(weights) > 3 and all(".fp16" in name and ".bin" not in name for name in weights)

    loaded = type(model).from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    with pytest.raises(OSError, match=WEIGHTS):
        type(model).from_pretrained(tmp_path, use_safetensors=True)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_of_another_architecture_are_refused(kind, low_cpu_mem_usage, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    channels = (*model.config.block_out_channels[:-1], 128)
    with pytest.raises((ValueError, RuntimeError), match=r"shape.*\b128\b"):
        type(model).from_pretrained(tmp_path, block_out_channels=channels, low_cpu_mem_usage=low_cpu_mem_usage)


def test_missing_weights_are_named(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(
        tmp_path, layers_per_block=3, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert any("resnets.2." in name for name in info["missing_keys"])


ON_CPU = ("cpu", {"": "cpu"})


@pytest.mark.parametrize("device_map", [*ON_CPU, "auto", "balanced", "sequential"], ids=str)
def test_device_map(kind, device_map, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size=model.get_memory_footprint() // 2)
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    is_elsewhere = torch.accelerator.is_available() and device_map not in ON_CPU
    device = torch.accelerator.current_accelerator() if is_elsewhere else torch.device("cpu")
    assert {torch.device(place).type for place in loaded.hf_device_map.values()} == {device.type}
    of_loaded = output(loaded, inputs(kind)).cpu()
    atol = 1e-2 if is_elsewhere else 0  # of convolutions in TF32
    torch.testing.assert_close(of_loaded, output(model, inputs(kind)), rtol=0, atol=atol)
