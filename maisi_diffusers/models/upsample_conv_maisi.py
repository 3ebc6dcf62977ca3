"""The convolution after nearest-neighbour doubling, without the doubled grid."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

# To add up the weights takes longer than it saves where there are fewer voxels than this for every channel.
VOXELS_PER_CHANNEL = 1


class MaisiUpsampleConv3d(nn.Conv3d):
    """
    A convolution of kernel 3 and padding 1 that can double every axis of its input first.

    On the doubled grid every voxel stands eight times, so that of three taps along an axis two fall on the same one.
    With their weights added up, each of the eight positions in a doubled voxel is a convolution of kernel 2 on the
    grid as it was: 8 x 8 instead of 8 x 27 products a voxel, and the same result but for rounding.

    It is made with the arguments of `nn.Conv3d`, as adapters do to make one like it.
    """

    def forward(self, hidden_states: torch.Tensor, upsample: bool = False) -> torch.Tensor:
        """(N, C, X, Y, Z) -> (N, out_channels, X, Y, Z), or with `upsample` twice as many voxels along each axis."""
        if not upsample:
            return super().forward(hidden_states)
        is_small = hidden_states[0, 0].numel() < VOXELS_PER_CHANNEL * self.in_channels
        if is_small or hidden_states.device.type != "cpu":  # a GPU is best at one large convolution
            return super().forward(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))

        size = hidden_states.shape[2:]
        padded = F.pad(hidden_states, (1,) * 6)
        outputs = []
        for phases in itertools.product((0, 1), repeat=3):
            weight, window = self.weight, padded
            for axis, (phase, n) in enumerate(zip(phases, size), start=2):
                first, second, third = weight.unbind(axis)
                # The first half of a doubled voxel sees the one before and twice its own, the second half the reverse.
                taps = [first + second, third] if phase else [first, second + third]
                weight = torch.stack(taps, dim=axis)
                window = window.narrow(axis, phase, n + 1)
            outputs.append(F.conv3d(window, weight, self.bias))
        doubled = torch.stack(outputs, dim=-1).unflatten(-1, (2, 2, 2))  # (N, C, X, Y, Z, 2, 2, 2)
        return doubled.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(*outputs[0].shape[:2], *(2 * n for n in size))


def upsample_and_convolve(hidden_states: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """Double every axis and convolve; an adapter around the convolution needs the doubled grid itself."""
    if isinstance(conv, MaisiUpsampleConv3d):
        return conv(hidden_states, upsample=True)
    return conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
