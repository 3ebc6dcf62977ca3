"""The two ways of a convolution in float32 on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from maisi_diffusers.models.conv_maisi import MaisiConv3d

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


@pytest.fixture
def conv() -> MaisiConv3d:
    torch.manual_seed(0)
    return MaisiConv3d(16, 8, kernel_size=3, padding=1)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Sizes of the volumes that oneDNN is called for by us."""
    calls, convolve = [], torch.mkldnn_convolution
    monkeypatch.setattr(
        torch, "mkldnn_convolution", lambda x, *args: calls.append(tuple(x.shape[2:])) or convolve(x, *args)
    )
    return calls


def plain(conv: MaisiConv3d, x: torch.Tensor) -> torch.Tensor:
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.padding)


@needs_onednn
@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"stride": 2, "padding": 1}, {"padding": (0, 1, 2), "bias": False}]
)
@torch.no_grad()
def test_gives_what_a_convolution_gives(calls, settings):
    torch.manual_seed(0)
    conv = MaisiConv3d(16, 8, kernel_size=3, **settings)
    x = torch.randn(2, 16, 6, 5, 4)
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        torch.testing.assert_close(conv(x.contiguous(memory_format=memory_format)), plain(conv, x))
    assert calls == [(6, 5, 4)] * 2


@needs_onednn
@torch.no_grad()
def test_with_fewer_voxels_than_channels_torch_chooses(conv, calls):
    conv(torch.randn(1, 16, 4, 2, 2))
    conv(torch.randn(1, 16, 5, 3, 1))
    assert calls == [(4, 2, 2)]


def test_training_goes_through_torch(conv, calls):
    x = torch.randn(1, 16, 4, 4, 4, requires_grad=True)
    gradients = [
        torch.autograd.grad(result.square().sum(), [x, conv.weight, conv.bias]) for result in (conv(x), plain(conv, x))
    ]
    torch.testing.assert_close(*gradients)
    assert not calls


@torch.no_grad()
def test_precision_is_that_of_autocast_or_of_the_weights(conv, calls):
    x = torch.randn(1, 16, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert not calls


@torch.no_grad()
def test_onednn_can_be_switched_off(conv, calls):
    with torch.backends.mkldnn.flags(enabled=False):
        conv(torch.randn(1, 16, 4, 4, 4))
    assert not calls


@torch.no_grad()
def test_compiles_without_a_break(conv, calls):
    x = torch.randn(1, 16, 4, 4, 4)
    torch.testing.assert_close(torch.compile(conv, backend="aot_eager", fullgraph=True)(x), plain(conv, x))
    assert not calls


@torch.no_grad()
def test_takes_an_adapter(conv):
    model, x = nn.ModuleDict({"conv": conv}), torch.randn(1, 16, 4, 4, 4)
    before = conv(x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False), model)
    lora = model["conv"]
    change = plain(lora.lora_A["default"], x)
    change = F.conv3d(change, lora.lora_B["default"].weight) * lora.scaling["default"]
    torch.testing.assert_close(lora(x), before + change)
    assert change.abs().max() > 1e-3
