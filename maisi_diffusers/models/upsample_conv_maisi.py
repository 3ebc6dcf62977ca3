"""The convolution after nearest-neighbour doubling, without the doubled grid."""

import torch
import torch.nn.functional as F
from torch import nn

# To add up the weights takes longer than it saves where there are fewer voxels than this for every channel.
VOXELS_PER_CHANNEL = 16


class MaisiUpsampleConv3d(nn.Conv3d):
    """
    A convolution of kernel 3 and padding 1 that can double every axis of its input first.

    Doubling writes every voxel twice along an axis: a transposed convolution of stride 2 whose kernel is two ones.
    With the convolution after it, it is one whose kernel has four taps, the three of the convolution added to
    themselves one tap further: 64 instead of 8 x 27 products a voxel of the grid as it was, and the same result but
    for rounding.

    It is made with the arguments of `nn.Conv3d`, as adapters do to make one like it.
    """

    def forward(self, hidden_states: torch.Tensor, upsample: bool = False) -> torch.Tensor:
        """(N, C, X, Y, Z) -> (N, out_channels, X, Y, Z), or with `upsample` twice as many voxels along each axis."""
        if not upsample:
            return super().forward(hidden_states)
        is_small = hidden_states[0, 0].numel() < VOXELS_PER_CHANNEL * self.in_channels
        if is_small or hidden_states.device.type != "cpu":  # a GPU is best at one large convolution
            return super().forward(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))

        # As transposed convolutions have it; with at least 32 bits, so that it is rounded once.
        kernel = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        kernel = kernel.transpose(0, 1).flip(2, 3, 4)
        for axis in range(3):
            before = [0, 0] * axis
            kernel = F.pad(kernel, [*before, 0, 1]) + F.pad(kernel, [*before, 1, 0])
        return F.conv_transpose3d(hidden_states, kernel.to(self.weight.dtype), self.bias, stride=2, padding=1)


def upsample_and_convolve(hidden_states: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """Double every axis and convolve; an adapter around the convolution needs the doubled grid itself."""
    if isinstance(conv, MaisiUpsampleConv3d):
        return conv(hidden_states, upsample=True)
    return conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
