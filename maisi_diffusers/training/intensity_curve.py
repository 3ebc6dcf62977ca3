"""A residual block of a VAE that begins as a curve: it gives intensities of a window more room, or takes it back."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from ..models.vae_blocks_maisi import MaisiVaeResnetBlock3D

# How much the square of a weight counts beside that of an error.
RIDGE = 1e-7
# Sharpness of a bend times the distance to the next: each is about as wide as they are apart.
BEND = 4.0
# Seven bends at these places of a window take its curve back to 1 HU, seven evenly spread ones to 6 HU.
PLACES = (-0.35, -0.15, 0.0, 0.5, 1.0, 1.15, 1.35)
# How much of what its neighbours are below air is taken from a voxel, and over how much of 0..1 this begins.
AIR_TAKEN, AIR_WIDTH = 1.5, 0.01


@dataclass
class IntensityCurve:
    """
    x + offset + sum of up * silu(sharpness * (x - knot)) + down * silu(-sharpness * (x - knot)).

    Args:
        knots, sharpness, up, down (K,): of the bends.
        offset: a constant.
    """

    knots: torch.Tensor
    sharpness: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    offset: float

    @classmethod
    def fit(cls, x: torch.Tensor, y: torch.Tensor, knots: torch.Tensor) -> Self:
        """The nearest one to values y (N,) at x (N,) with bends at ascending knots (K,), in least squares."""
        sharpness = BEND / torch.gradient(knots)[0]
        bends = sharpness * (x[:, None] - knots)
        features = torch.cat([F.silu(bends), F.silu(-bends), torch.ones_like(x)[:, None]], dim=1)
        squares = features.T @ features + RIDGE * len(x) * torch.eye(features.shape[1], dtype=x.dtype)
        up, down, offset = torch.linalg.solve(squares, features.T @ (y - x)).split([len(knots), len(knots), 1])
        return cls(knots, sharpness, up, down, float(offset))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Its values at x, of any shape and dtype, as float64."""
        x = x.double()
        y = x + self.offset
        for knot, sharpness, up, down in zip(self.knots, self.sharpness, self.up, self.down):
            bend = sharpness * (x - knot)
            y += up * F.silu(bend) + down * F.silu(-bend)
        return y

    def lowered(self, by: float) -> Self:
        """The curve that gives as much less."""
        return replace(self, offset=self.offset - by)

    def inverse(self, x: torch.Tensor, knots: torch.Tensor) -> Self:
        """The nearest curve to the way back, to values x (N,) that are wanted, with bends at some of them."""
        return type(self).fit(self(x), x, self(knots))

    def with_flat_bend(self, knot: float, sharpness: float) -> Self:
        """The same values, with one more bend, which is none yet."""
        more = {"knots": knot, "sharpness": sharpness, "up": 0.0, "down": 0.0}
        return replace(self, **{name: F.pad(getattr(self, name), (0, 1), value=value) for name, value in more.items()})


def window_curve(low: float, high: float, gain: float, x: torch.Tensor, num_knots: int) -> IntensityCurve:
    """The curve that is `gain` times as steep from `low` to `high` as it is below and above, for values x (N,)."""
    reach = (high - low) / 2
    knots = torch.linspace(low - reach, high + reach, num_knots, dtype=x.dtype)
    return IntensityCurve.fit(x, x + (gain - 1) * (x.clip(low, high) - low), knots)


def knots_back(low: float, high: float, number: int) -> torch.Tensor:
    """Where the way back of [`window_curve`] best has its bends: most of them at the ends of the window."""
    places = np.interp(np.linspace(0, len(PLACES) - 1, number), range(len(PLACES)), PLACES)
    return torch.from_numpy(low + (high - low) * places)


@torch.no_grad()
def set_curve(
    resnet: MaisiVaeResnetBlock3D, curve: IntensityCurve, square: float, size: float, outputs: torch.Tensor
) -> None:
    """
    Let a residual block add to its first channels what a curve adds to x.

    Group norms would take the mean from it: so x comes in as x and -x, and every bend goes through as two channels,
    one of them negative; small beside the norms' epsilon, which then leave them nearly as they are.

    Args:
        resnet: its first two input channels are x and -x, the others 0; twice as many channels as bends, or more.
        curve: a curve.
        square: mean of x^2.
        size: of what goes through the norms, for an x of 1.
        outputs (n,): what its first output channels get of that.
    """
    of_group = resnet.norm1.num_channels // resnet.norm1.num_groups
    resnet.norm1.weight.fill_((2 * square / of_group + resnet.norm1.eps) ** 0.5)
    centre, number = (slice(None), slice(None), 1, 1, 1), 2 * len(curve.knots)
    for conv in (resnet.conv1, resnet.conv2):
        conv.weight.zero_()
        conv.bias.zero_()
    # silu(x) - silu(-x) is x.
    signs = torch.tensor([1.0, -1.0]).repeat(len(curve.knots))
    resnet.conv1.weight[centre][:number, 0], resnet.conv1.weight[centre][:number, 1] = signs * size, -signs * size
    resnet.conv1.bias[:number] = -signs * size * curve.knots.repeat_interleave(2).float()

    channels, of_group = resnet.norm2.num_channels, resnet.norm2.num_channels // resnet.norm2.num_groups
    squares = torch.zeros(channels)
    squares[:number] = size**2 * (square + curve.knots.square()).repeat_interleave(2).float()
    gain = (squares.view(-1, of_group).mean(1) + resnet.norm2.eps).sqrt().repeat_interleave(of_group)
    resnet.norm2.weight[:number] = gain[:number] * curve.sharpness.repeat_interleave(2).float() / size
    bends = torch.stack([curve.up, curve.down], dim=1).flatten().float()
    resnet.conv2.weight[centre][: len(outputs), :number] = outputs[:, None] * bends
    resnet.conv2.bias[: len(outputs)] = outputs * curve.offset


@torch.no_grad()
def set_curve_and_air(
    resnet: MaisiVaeResnetBlock3D, curve: IntensityCurve, air: float, square: float, size: float, outputs: torch.Tensor
) -> None:
    """
    [`set_curve`], and a voxel gets darker by what it and its 26 neighbours are below air, on average and times
    `AIR_TAKEN`. Where all is air, noise so ends where intensities are clipped; away from air nothing changes, and
    beside it little.

    Args:
        resnet, curve, square, size, outputs: see [`set_curve`].
        air: the x below which this begins, where the curve is as steep as x.
    """
    set_curve(resnet, curve.with_flat_bend(air, 1 / AIR_WIDTH), square, size, outputs)
    below = resnet.conv2.weight[:, 2 * len(curve.knots) + 1]
    below[: len(outputs)] -= (AIR_TAKEN * AIR_WIDTH / below[0].numel()) * outputs[:, None, None, None]
