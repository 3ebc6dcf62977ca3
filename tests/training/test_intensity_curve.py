"""Curves that give a window of intensities more room, and back."""

import pytest
import torch

from maisi_diffusers.models.vae_blocks_maisi import MaisiVaeResnetBlock3D
from maisi_diffusers.training.intensity_curve import knots_back, set_curve, set_curve_and_air, window_curve

GRID = torch.linspace(-0.4, 0.6, 1001, dtype=torch.float64)


@pytest.mark.parametrize("gain", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("number", [4, 8])
def test_there_and_back(gain, number):
    curve = window_curve(-0.1, 0.2, gain, GRID, number)
    y = curve(GRID)
    assert (y.diff() > 0).all()
    steepness = y.diff() / GRID.diff()
    for where, expected in ((-0.35, 1), (0.05, gain), (0.5, 1)):
        assert abs(steepness[(GRID[1:] - where).abs().argmin()] - expected) < 0.25 * max(gain, 1 / gain)
    assert (curve.inverse(GRID, knots_back(-0.1, 0.2, number))(y) - GRID).abs().max() < 0.02
    assert torch.allclose(curve.lowered(0.3)(GRID), y - 0.3)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (32, 16)])
@torch.no_grad()
def test_in_a_residual_block(inputs, outputs):
    """It adds to the first channels what the curve adds, whatever else the volume has in it."""
    torch.manual_seed(0)
    resnet = MaisiVaeResnetBlock3D(inputs, outputs, norm_num_groups=4, norm_eps=1.0)
    curve = window_curve(-0.1, 0.2, 4.0, GRID, 8)
    for where in (GRID, GRID[GRID < 0.1]):
        x = where[torch.randint(len(where), (1, 1, 6, 6, 6))].float()
        set_curve(resnet, curve, float((GRID**2).mean()), 0.1, torch.tensor([0.5, -0.5]))
        if resnet.conv_shortcut is not None:
            torch.nn.init.zeros_(resnet.conv_shortcut.weight)
            torch.nn.init.zeros_(resnet.conv_shortcut.bias)
        features = torch.cat([x, -x, torch.zeros(1, inputs - 2, 6, 6, 6)], dim=1)
        added = resnet(features) - (features if resnet.conv_shortcut is None else 0)
        expected = 0.5 * (curve(x) - x)
        assert (added[:, :1] - expected).abs().max() < 0.01
        assert (added[:, 1:2] + expected).abs().max() < 0.01
        assert not added[:, 2:].any()


@torch.no_grad()
def test_air():
    """Noise of air ends at the bottom; what is not air stays, but for a little beside it."""
    torch.manual_seed(0)
    resnet = MaisiVaeResnetBlock3D(16, 16, norm_num_groups=4, norm_eps=1.0)
    curve = window_curve(-0.1, 0.2, 4.0, GRID, 8)
    back = curve.inverse(GRID, knots_back(-0.1, 0.2, 7))
    x = torch.full((1, 1, 8, 8, 24), -0.4)
    x[..., 8:16], x[..., 16:] = -0.28, 0.1  # air, lung, tissue
    noisy = x + 0.015 * torch.randn(x.shape)
    y = curve(noisy).float()
    features = torch.cat([y, -y, torch.zeros(1, 14, 8, 8, 24)], dim=1)
    air = float(curve(torch.tensor(-0.35)))
    set_curve_and_air(resnet, back, air, float(y.square().mean()), 0.1, torch.tensor([1.0, -1.0]))
    result = resnet(features)[:, 0]
    inside = (slice(None), slice(1, -1), slice(1, -1), slice(7))
    assert (noisy[0][inside] > -0.375).any() and (result[inside] < -0.4).all()
    for rest in (slice(9, 16), slice(16, 24)):
        assert (result[..., rest] - noisy[0, ..., rest]).abs().max() < 0.02
    assert -0.04 < (result[..., 8] - noisy[0, ..., 8]).mean() < 0
