"""A convolution of the VAE, slab by slab, with the norm and the activation before it."""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from . import winograd
from .group_statistics import GroupStatistics

# Winograd's products must save more than its sums take: channels from which they do, by the bytes of a value. Measured
# for 64 to 256 channels.
WINOGRAD_CHANNELS = {4: 32, 2: 64}
# Bytes and planes of a slab on the CPU: thicker ones leave its cache, thinner ones have many neighbours.
CPU_SLAB = 20e6
CPU_PLANES = 4


class SlabConvolution:
    """
    A convolution of kernel 3 and padding 1 of slabs along X.

    Args:
        conv: the layer; an adapter around one or a layer with hooks is called, not imitated.
    """

    def __init__(self, conv: nn.Module):
        self.conv, self.out_channels = conv, out_channels(conv)
        self.is_plain = type(conv) is nn.Conv3d and not (
            conv._forward_pre_hooks or conv._forward_hooks or "forward" in vars(conv)
        )
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else conv.weight.dtype
        self.saves_products = (
            self.is_plain
            and conv.weight.device.type == "cpu"
            and min(conv.in_channels, conv.out_channels) >= WINOGRAD_CHANNELS.get(dtype.itemsize, math.inf)
        )
        self.is_along_x = dtype != torch.float32
        if self.saves_products:
            transform = winograd.transform_weight_along_x if self.is_along_x else winograd.transform_weight
            self.weight = transform(conv.weight)
        elif self.is_plain:  # the result has the channels of a voxel side by side if the weight has
            self.weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)

    def __call__(
        self,
        slab: torch.Tensor,
        is_first: bool,
        is_last: bool,
        statistics: GroupStatistics | None = None,
        activate: bool = False,
    ) -> torch.Tensor:
        """
        Norm, SiLU and convolution, as far as they are wanted.

        Args:
            slab (1, C, x, Y, Z): with the planes before and behind it, which the result is without.
            is_first, is_last: whether the volume ends there: then there is no plane beyond, and 0 is in its place.
            statistics: for the norm.
            activate: whether SiLU comes after the norm.
        """
        if not self.is_plain:
            if statistics is not None:
                prepared = torch.empty_like(slab)
                statistics.normalize(slab, prepared, activate)
                slab = prepared
            return self.conv(slab)[:, :, 0 if is_first else 1 : None if is_last else -1]

        _, channels, planes, rows, columns = slab.shape
        before, behind, beside = int(is_first), int(is_last), int(self.saves_products)
        # Winograd makes two planes, and two rows, at once: one more of zeros where there is none for the last.
        more_planes = (planes + before + behind) % 2 if self.saves_products else 0
        more_rows = rows % 2 if self.saves_products and not self.is_along_x else 0
        size = (before + planes + behind + more_planes, beside + rows + beside + more_rows, columns)
        padded = slab.new_empty(1, *size, channels).permute(0, 4, 1, 2, 3)
        padded[:, :, :before] = padded[:, :, before + planes :] = 0
        padded[:, :, :, :beside] = padded[:, :, :, beside + rows :] = 0
        inside = padded[:, :, before : before + planes, beside : beside + rows]
        if statistics is None:
            inside.copy_(slab)
        else:
            statistics.normalize(slab, inside, activate)
        if not self.saves_products:
            return F.conv3d(padded, self.weight, self.conv.bias, padding=(0, 1, 1))
        result = winograd.convolve(padded[0].transpose(0, 1), self.weight, self.conv.bias).transpose(0, 1)[None]
        return result[:, :, : result.shape[2] - more_planes, : result.shape[3] - more_rows]

    def in_parts(self, slab: torch.Tensor, is_first: bool, is_last: bool, *args) -> torch.Tensor:
        """The same for a thick slab: on the CPU in parts that stay in its cache."""
        _, channels, planes, rows, columns = slab.shape
        start, stop = int(not is_first), planes - int(not is_last)
        thickness = planes_in_cache(max(channels, self.out_channels), rows * columns, slab.device)
        if thickness >= stop - start or not self.is_plain:
            return self(slab, is_first, is_last, *args)
        result = slab.new_empty(1, stop - start, rows, columns, self.out_channels).permute(0, 4, 1, 2, 3)
        for first in range(start, stop, thickness):
            last = min(first + thickness, stop)
            part = slab[:, :, max(first - 1, 0) : last + 1]
            result[:, :, first - start : last - start] = self(part, first == 0, last == planes, *args)
        return result


def planes_in_cache(channels: int, voxels: int, device: torch.device) -> int:
    """How many planes with so many voxels a convolution gets at once on a device."""
    if device.type != "cpu":
        return sys.maxsize
    return max(int(CPU_SLAB / (channels * voxels * torch.float32.itemsize)), CPU_PLANES)


def out_channels(conv: nn.Module) -> int:
    """Of a convolution, also one in an adapter."""
    return getattr(conv, "base_layer", conv).out_channels
