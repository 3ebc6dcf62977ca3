"""Ways to need less memory: recomputing activations, casting layer by layer, weights on the disk."""

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from diffusers import TorchAoConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maisi_diffusers.models import AutoencoderKLMaisi, MaisiControlNetModel
from maisi_diffusers.models.unet_3d_blocks_maisi import MaisiDownsample3D, MaisiResnetBlock3D, MaisiUpsample3D

from .networks import DENOISERS, KINDS, VAES, build, deviation, inputs, output, with_dtype


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# Gradient checkpointing


def loss_and_gradients(model, arguments):
    """Also the bytes that autograd kept for the backward pass, parameters aside."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = output(model, arguments).square().mean()
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}, sum(kept.values())


def test_gradient_checkpointing(kind):
    model, arguments = build(kind).train(), inputs(kind)
    loss, gradients, kept = loss_and_gradients(model, arguments)

    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    recomputed_loss, recomputed, kept_by_recomputing = loss_and_gradients(model, arguments)
    assert torch.equal(recomputed_loss, loss)
    for name, gradient in gradients.items():
        assert gradient.any() and deviation(recomputed[name], gradient) < 1e-6, name
    assert kept_by_recomputing < 0.5 * kept

    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    assert loss_and_gradients(model, arguments)[2] == kept


def test_every_layer_is_checkpointed(kind):
    """Once; of a resnet block and of an upsampler, each convolution with what comes before it."""
    model, called = build(kind), []

    def spy(step, *args):
        called.extend([step] if isinstance(step, nn.Module) else convolutions(args))
        return step(*args)

    def convolutions(args):
        return [
            part for arg in args for part in (arg if isinstance(arg, list) else [arg]) if isinstance(part, nn.Conv3d)
        ]

    model.enable_gradient_checkpointing(spy)
    output(model, inputs(kind))
    layers = []
    for block in model.modules():
        if type(block).__name__ in model._no_split_modules:
            for layer in block.children():
                layers += layer if isinstance(layer, nn.ModuleList) else [layer]
    expected = set()
    for layer in layers:
        if isinstance(layer, MaisiResnetBlock3D):
            expected |= {layer.conv1, layer.conv2}
        elif isinstance(layer, MaisiUpsample3D):
            expected.add(layer.conv)
        elif not isinstance(layer, MaisiDownsample3D):  # a convolution alone, whose input is a skip
            expected.add(layer)
    if kind == "controlnet":
        embedding = model.controlnet_cond_embedding
        expected |= {embedding.conv_in, *embedding.blocks, embedding.conv_out}
    assert set(called) == expected and len(called) == len(expected)

    called.clear()
    with torch.no_grad():
        output(model, inputs(kind))
    assert not called


class CountConvolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "recomputed"), [("rflow unet", 0), ("ddpm unet", 0), ("controlnet", 2)])
def test_convolutions_are_not_recomputed(kind, recomputed):
    """But for the first two of the condition's embedding, at full resolution."""
    model = build(kind).train()
    model.enable_gradient_checkpointing()
    loss = output(model, inputs(kind)).square().mean()
    with CountConvolutions() as convolutions:
        loss.backward()
    assert convolutions.count == recomputed


@pytest.mark.parametrize("length", [8, 10, 20])
def test_embedding_in_slabs(length):
    """One slab, two of which the last is short, and three."""
    model, arguments = build("controlnet").train(), inputs("controlnet", size=(length, 2, 4))
    loss, gradients, _ = loss_and_gradients(model, arguments)
    plain = output(model, arguments)
    model.enable_gradient_checkpointing()
    slab_loss, slab_gradients, _ = loss_and_gradients(model, arguments)
    assert deviation(output(model, arguments), plain) < 1e-6
    assert abs(slab_loss - loss) < 1e-6 * loss
    for name, gradient in gradients.items():
        assert deviation(slab_gradients[name], gradient) < 1e-5, name


# Casting layer by layer

FULL_PRECISION = {
    "rflow unet": ["time_embedding", "class_embedding", "spacing_embedding"],
    "ddpm unet": ["time_embedding", "top_region_embedding", "bottom_region_embedding", "spacing_embedding"],
    "mask unet": ["time_embedding"],
    "controlnet": ["time_embedding", "class_embedding"],
    "image vae": ["encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv"],
}
FULL_PRECISION["image vae"] += ["post_quant_conv"]
FULL_PRECISION["mask vae"] = FULL_PRECISION["image vae"]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_casting(kind, compute_dtype):
    model, arguments = build(kind).to(compute_dtype), with_dtype(inputs(kind), compute_dtype)
    expected = output(model, arguments)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    assert model.dtype == compute_dtype

    for _ in range(2):
        result = output(model, arguments)
        assert result.dtype == compute_dtype
        assert 0 < deviation(result.float(), expected.float()) < 0.2
        for name, module in model.named_modules():
            kept = isinstance(module, nn.GroupNorm | nn.LayerNorm)
            kept = kept or any(name == part or name.startswith(f"{part}.") for part in FULL_PRECISION[kind])
            for parameter in module.parameters(recurse=False):
                assert parameter.dtype == (compute_dtype if kept else torch.float8_e4m3fn), name


# Eight bits


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("kind", DENOISERS)
def test_torchao(kind, tmp_path):
    """
    Linear layers alone are stored in 8 bits; convolutions, most of the network, stay as they are.

    Skipped without torchao, which is no requirement of the tests: where it is installed, every import of diffusers
    prints what torchao could not load, and tests look at what is printed.
    """
    torchao = pytest.importorskip("torchao.quantization")
    model = build(kind)
    model.save_pretrained(tmp_path)
    quantized = type(model).from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), torch_dtype=torch.bfloat16
    )
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.qdata.dtype == torch.int8, name
        elif isinstance(module, nn.Conv3d):
            assert type(module.weight.data) is torch.Tensor and module.weight.dtype == torch.bfloat16, name
    arguments = with_dtype(inputs(kind), torch.bfloat16)
    expected, result = (output(network, arguments).float() for network in (model.to(torch.bfloat16), quantized))
    assert 0 < deviation(result, expected) < 0.05


# Weights elsewhere


def parts(kind, model):
    """Everything public that a network computes, also by other ways than `forward`."""
    arguments = inputs(kind)
    if isinstance(model, AutoencoderKLMaisi):
        latent = model.encode(arguments["sample"]).latent_dist.mode()
        return [latent, model.decode(latent).sample, output(model, arguments)]
    if isinstance(model, MaisiControlNetModel):
        return [model.embed_condition(arguments["controlnet_cond"]), output(model, arguments)]
    return [output(model, arguments)]


def build_in_one_piece(kind):
    """A network that computes as it does where its layers are offloaded."""
    model = build(kind)
    if kind in VAES:
        model.disable_tiling()
    return model


def assert_same_parts(kind, model, expected):
    """To the bit, but for a VAE: its encoder or decoder may have all weights at hand, and slabs round otherwise."""
    for _ in range(2):
        for one, other in zip(parts(kind, model), expected, strict=True):
            assert deviation(one, other) < 2e-5 if kind in VAES else torch.equal(one, other)


def split_blocks(model, device_map):
    """Entries of a device map that lie inside a block that must stay in one piece."""
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    return [entry for entry in device_map if any(entry.startswith(f"{block}.") for block in blocks)]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("part", [0.5, 0.7, 0.9])
def test_dispatch_to_cpu_and_disk(kind, part, tmp_path):
    model = build_in_one_piece(kind)
    expected = parts(kind, model)
    memory = {"cpu": int(part * model.get_memory_footprint())}
    device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    assert set(device_map.values()) == {"cpu", "disk"}
    assert not split_blocks(model, device_map)

    if kind in VAES:
        model.enable_auto_tiling()
    model = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_same_parts(kind, model, expected)


def test_blocks_would_be_split_otherwise(kind):
    model = build(kind)
    memories = [{"cpu": int(part * model.get_memory_footprint())} for part in (0.5, 0.7, 0.9)]
    assert any(split_blocks(model, infer_auto_device_map(model, memory)) for memory in memories)


@pytest.mark.usefixtures("no_grad")
def test_load_to_cpu_and_disk(kind, tmp_path):
    model = build_in_one_piece(kind)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": model.get_memory_footprint() // 2},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_same_parts(kind, loaded, parts(kind, model))


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(kind, offload_type, tmp_path):
    model = build_in_one_piece(kind)
    expected = parts(kind, model)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    assert_same_parts(kind, model, expected)


def test_networks_here_are_all_of_them():
    assert {*DENOISERS, *VAES} == set(KINDS) == set(FULL_PRECISION)
