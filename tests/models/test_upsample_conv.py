"""The convolution after doubling, in one step with it."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from maisi_diffusers.models.upsample_conv_maisi import MaisiUpsampleConv3d, upsample_and_convolve

KERNEL = {"kernel_size": 3, "padding": 1}


def doubled(hidden_states: torch.Tensor) -> torch.Tensor:
    return F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")


def plain(conv: MaisiUpsampleConv3d, hidden_states: torch.Tensor) -> torch.Tensor:
    return F.conv3d(doubled(hidden_states), conv.weight, conv.bias, padding=1)


# The last has few voxels for its channels, so that the doubled grid is made.
@pytest.mark.parametrize(
    "channels, size", [((2, 6), (3, 4, 5)), ((1, 1), (16, 1, 1)), ((2, 3), (2, 7, 3)), ((9, 4), (2, 2, 2))]
)
def test_equals_the_convolution_of_the_doubled_grid(channels, size):
    torch.manual_seed(0)
    conv = MaisiUpsampleConv3d(*channels, **KERNEL).double()
    hidden_states = torch.randn(2, channels[0], *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = conv(hidden_states, upsample=True), plain(conv, hidden_states)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    inputs = [hidden_states, conv.weight, conv.bias]
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((theirs * weights).sum(), inputs)
    ):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_weights_in_16_bits_are_rounded_once():
    """Of sums that are rounded each, the error is 1.9 times as large as that of the convolution."""
    torch.manual_seed(0)
    conv = MaisiUpsampleConv3d(16, 16, **KERNEL).bfloat16()
    hidden_states = torch.randn(1, 16, 8, 8, 8).bfloat16()
    ours, theirs = conv(hidden_states, upsample=True), plain(conv, hidden_states)
    expected = plain(conv.double(), hidden_states.double())
    errors = [(one.double() - expected).square().mean().sqrt() for one in (theirs, ours)]
    assert ours.dtype == torch.bfloat16 and errors[1] < 1.6 * errors[0]


def test_the_doubled_grid_is_not_made_where_that_saves_work(monkeypatch):
    shapes = []
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, **how: shapes.append(tuple(x.shape[2:])) or interpolate(x, **how))
    conv = MaisiUpsampleConv3d(8, 2, **KERNEL)
    conv(torch.zeros(1, 8, 4, 4, 8), upsample=True)
    assert not shapes
    conv(torch.zeros(1, 8, 4, 4, 7), upsample=True)
    assert shapes == [(4, 4, 7)]


def test_a_plain_convolution_without_upsampling():
    conv = MaisiUpsampleConv3d(3, 5, **KERNEL)
    hidden_states = torch.randn(1, 3, 4, 4, 4)
    torch.testing.assert_close(conv(hidden_states), F.conv3d(hidden_states, conv.weight, conv.bias, padding=1))


def test_keys_are_those_of_a_convolution():
    assert MaisiUpsampleConv3d(2, 3, **KERNEL).state_dict().keys() == nn.Conv3d(2, 3, 3).state_dict().keys()


def test_an_adapter_sees_the_doubled_grid():
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv1": MaisiUpsampleConv3d(4, 4, **KERNEL)})
    hidden_states = torch.randn(1, 4, 3, 3, 3)
    before = upsample_and_convolve(hidden_states, model["conv1"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), model)
    after = upsample_and_convolve(hidden_states, model["conv1"])
    lora = model["conv1"]
    change = lora.lora_B["default"](lora.lora_A["default"](doubled(hidden_states))) * lora.scaling["default"]
    torch.testing.assert_close(after, before + change)
    assert change.abs().max() > 1e-3
