"""Low-rank adapters by peft, on linear layers and on 3D convolutions."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Conv3d, Linear
from safetensors import safe_open

from .networks import DENOISERS, build, deviation, inputs, output

ATTENTION = ["to_q", "to_k", "to_v"]
CONVOLUTIONS = ["conv1", "conv2"]
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(params=["rflow unet", "mask unet", "controlnet", "image vae"])
def kind(request):
    return request.param


def adapter_config(kind, rank=4, **overrides):
    targets = ATTENTION + CONVOLUTIONS if kind in DENOISERS else CONVOLUTIONS
    # An alpha other than the rank, so that a lost scale shows.
    return LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, **overrides)


def with_adapter(kind, seed=7, name="default", model=None):
    """A network with an adapter that is not zero, in evaluation mode."""
    model = build(kind) if model is None else model
    torch.manual_seed(seed)
    model.add_adapter(adapter_config(kind, init_lora_weights="gaussian"), name)
    for parameter_name, parameter in model.named_parameters():
        if f"lora_B.{name}." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@torch.no_grad()
def evaluate(model, kind):
    if kind not in DENOISERS:
        model.disable_tiling()  # in slabs, plain convolutions are computed in another way than adapted ones
    return output(model, inputs(kind))


def test_new_adapter_changes_nothing(kind):
    model = build(kind)
    expected = evaluate(model, kind)
    model.add_adapter(adapter_config(kind))
    assert deviation(evaluate(model, kind), expected) < 1e-5
    assert model.active_adapters() == ["default"]


def test_adapted_layers(kind):
    model = with_adapter(kind)
    adapted = {name: type(module) for name, module in model.named_modules() if isinstance(module, Linear | Conv3d)}
    targets = {name for name, _ in build(kind).named_modules() if name.split(".")[-1] in ATTENTION + CONVOLUTIONS}
    assert set(adapted) == targets
    assert set(adapted.values()) == ({Linear, Conv3d} if kind in DENOISERS else {Conv3d})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(kind, checkpointing):
    model, arguments = build(kind), inputs(kind)
    with torch.no_grad():
        before = output(model, arguments)
    target = before + 0.1
    model.add_adapter(adapter_config(kind))
    if checkpointing:
        model.enable_gradient_checkpointing()
    base = {name: weight.clone() for name, weight in model.state_dict().items() if "lora" not in name}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }

    optimizer, losses = torch.optim.Adam(trained, lr=1e-3), []
    for _ in range(5):
        loss = (output(model, arguments) - target).square().mean()
        loss.backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in base.items())
    assert deviation(evaluate(model, kind), before) > 1e-3


def test_saved_adapter_is_the_same(kind, tmp_path):
    model = with_adapter(kind)
    base = evaluate(build(kind), kind)
    expected = evaluate(model, kind)
    assert deviation(expected, base) > 1e-2

    model.save_lora_adapter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER]
    with safe_open(tmp_path / ADAPTER, framework="pt") as file:
        assert all("lora_A" in name or "lora_B" in name for name in file.keys())  # noqa: SIM118

    loaded = build(kind)
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="loaded")
    assert loaded.active_adapters() == ["loaded"]
    assert torch.equal(evaluate(loaded.eval(), kind), expected)
    with pytest.raises(ValueError, match="already in use"):
        loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, adapter_name="loaded")


def test_disable_enable_delete(kind):
    base = evaluate(build(kind), kind)
    model = with_adapter(kind)
    adapted = evaluate(model, kind)

    # With other kernels for the same convolution, sums are rounded otherwise.
    model.disable_adapters()
    assert deviation(evaluate(model, kind), base) < 1e-5
    model.enable_adapters()
    assert torch.equal(evaluate(model, kind), adapted)
    model.disable_lora()
    assert deviation(evaluate(model, kind), base) < 1e-5
    model.enable_lora()
    assert torch.equal(evaluate(model, kind), adapted)

    model.delete_adapters("default")
    assert deviation(evaluate(model, kind), base) < 1e-5
    assert not hasattr(model, "peft_config")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_adapters(kind):
    base = evaluate(build(kind), kind)
    one, other = evaluate(with_adapter(kind, 7), kind), evaluate(with_adapter(kind, 8), kind)
    model = with_adapter(kind, 8, "other", with_adapter(kind, 7, "one"))
    model.set_adapter("one")
    assert torch.equal(evaluate(model, kind), one)
    model.set_adapter("other")
    assert torch.equal(evaluate(model, kind), other)

    model.set_adapters(["one", "other"], [1.0, 0.0])
    assert deviation(evaluate(model, kind), one) < 1e-5
    model.set_adapters(["one", "other"], [0.0, 0.5])
    half = evaluate(model, kind)
    assert deviation(half, other) > 1e-3 and deviation(half, base) > 1e-3


def test_fuse_and_unload(kind):
    plain = build(kind)
    base = evaluate(plain, kind)
    model = with_adapter(kind)
    adapted = evaluate(model, kind)

    model.fuse_lora()
    assert deviation(evaluate(model, kind), adapted) < 1e-5
    model.unfuse_lora()
    assert deviation(evaluate(model, kind), adapted) < 1e-5

    model.set_adapters("default", 0.5)
    half = evaluate(model, kind)
    model.set_adapters("default", 1.0)
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    assert deviation(evaluate(model, kind), half) < 1e-5
    assert deviation(half, base) > 1e-3

    model.unload_lora()  # what was fused stays
    assert set(model.state_dict()) == set(plain.state_dict())
    assert deviation(evaluate(model, kind), half) < 1e-5


def test_save_with_the_adapter_fused(kind, tmp_path):
    model = with_adapter(kind)
    adapted = evaluate(model, kind)
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path)
    assert deviation(evaluate(type(model).from_pretrained(tmp_path), kind), adapted) < 1e-5
