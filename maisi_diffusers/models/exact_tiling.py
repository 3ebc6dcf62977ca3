"""
The VAE's encoder and decoder in slabs, with the result of the whole: every convolution sees its true neighbours, every
group norm the statistics of the whole volume.

A layer goes through the volume slab by slab before the next one begins, which needs the statistics of all that this
one makes. Two volumes of features are kept at most, since a residual block writes its result over its input: in memory
or in a scratch file where they do not fit.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from .activations import Activations
from .group_statistics import GroupStatistics
from .vae_blocks_maisi import (
    MaisiDecoder3D,
    MaisiEncoder3D,
    MaisiVaeDownsample3D,
    MaisiVaeResnetBlock3D,
    MaisiVaeUpsample3D,
)

# Slabs at once, in float32, which statistics are made in: what is read, padded and convolved, the residual, deviations
# from the mean, and what the convolution itself takes. Measured.
SLABS_AT_ONCE = 6


class ExactTiling:
    """
    Runs [`MaisiEncoder3D`] or [`MaisiDecoder3D`] in slabs along X.

    Args:
        memory: bytes that features may take at once on the device. On the CPU those that are kept between layers count
            too, and go to a scratch file where they do not fit; of a GPU they are kept on the host.
        folder: where a scratch file is made; the system's for temporary files if not given.
    """

    def __init__(self, memory: int, folder: str | os.PathLike | None = None):
        self.memory = memory
        self.folder = tempfile.gettempdir() if folder is None else folder

    @torch.no_grad()
    def run(
        self,
        network: MaisiEncoder3D | MaisiDecoder3D,
        x: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda slab: slab,
    ) -> torch.Tensor:
        """
        What a network makes of one sample.

        Args:
            network: the encoder or the decoder.
            x (1, C, X, Y, Z): its input.
            finish: what becomes of every slab of its output.

        Returns:
            (1, C', X', Y', Z'), of the channels and the dtype that `finish` gives.
        """
        steps = [step for block in network.blocks for step in (*block.resnets, block.resampler) if step is not None]
        norms = [step.norm1 if isinstance(step, MaisiVaeResnetBlock3D) else None for step in steps]
        norms.append(network.conv_norm_out)
        self.plan(steps, x)

        source = Activations(x.shape[1], x.shape[2:], x.dtype, x.device)
        source.write(0, x)
        features, statistics = self.keep(self.convolved(source, network.conv_in), source.size, norms[0])
        for step, norm in zip(steps, norms[1:]):
            if isinstance(step, MaisiVaeResnetBlock3D):
                features, statistics = self.resnet(features, statistics, step, norm)
            else:
                features, statistics = self.resample(features, step, norm)

        result = None
        for start, slab in self.convolved(features, network.conv_out, statistics, activate=False):
            slab = finish(slab)
            if result is None:
                result = torch.empty((1, slab.shape[1], *features.size), dtype=slab.dtype, device=slab.device)
            result[:, :, start : start + slab.shape[2]] = slab
        return result

    def plan(self, steps: list[nn.Module], x: torch.Tensor) -> None:
        """Where features are kept, and what that leaves for slabs."""
        size, largest = x.shape[2:], 0
        for step in steps:
            if isinstance(step, MaisiVaeResnetBlock3D):
                channels = out_channels(step.conv2)
            else:
                size, channels = resampled_size(step, size), out_channels(step.conv)
            largest = max(largest, channels * math.prod(size) * x.element_size())
        kept, left = 2 * largest, self.memory
        if x.device.type == "cpu":
            left -= kept
            fits = left >= self.memory / 2
        else:
            fits = kept <= psutil.virtual_memory().available / 2
        self.for_slabs, self.where = (left, None) if fits else (self.memory, self.folder)

    def slabs(self, size: tuple[int, int, int], plane_values: float, multiple: int = 1) -> Iterator[slice]:
        """Cuts along X: as thick as the memory lets, each a multiple of some planes."""
        planes = int(self.for_slabs // (plane_values * torch.float32.itemsize * SLABS_AT_ONCE)) - 2
        thickness = max(planes // multiple, 1) * multiple
        for start in range(0, size[0], thickness):
            yield slice(start, min(start + thickness, size[0]))

    def keep(
        self,
        slabs: Iterator[tuple[int, torch.Tensor]],
        size: tuple[int, int, int],
        norm: nn.GroupNorm | None,
        target: Activations | None = None,
    ) -> tuple[Activations, GroupStatistics | None]:
        """Slab after slab as features of a size, or over others; and their statistics for the norm that comes next."""
        statistics = None if norm is None else GroupStatistics(norm)
        for start, slab in slabs:
            if target is None:
                target = Activations(slab.shape[1], size, slab.dtype, slab.device, self.where)
            if statistics is not None:
                statistics.add(slab)
            target.write(start, slab)
        return target, statistics

    def convolved(
        self,
        source: Activations,
        conv: nn.Conv3d,
        statistics: GroupStatistics | None = None,
        activate: bool = False,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """First plane and slab after slab of norm, SiLU and convolution, as far as they are wanted."""
        plane_values = source.plane_values * max(1, out_channels(conv) / source.channels)
        for planes in self.slabs(source.size, plane_values):
            slab = source.read(max(planes.start - 1, 0), min(planes.stop + 1, source.size[0]))
            if statistics is not None:
                slab = statistics.normalize(slab)
            if activate:
                slab = F.silu(slab, inplace=True)
            yield planes.start, convolve_slab(conv, slab, planes.start == 0, planes.stop == source.size[0])

    def resnet(
        self, source: Activations, statistics: GroupStatistics, block: MaisiVaeResnetBlock3D, norm: nn.GroupNorm | None
    ) -> tuple[Activations, GroupStatistics | None]:
        """A residual block, and the statistics for the norm that comes next."""
        first = self.convolved(source, block.conv1, statistics, activate=True)
        middle, statistics = self.keep(first, source.size, block.norm2)

        def with_residual() -> Iterator[tuple[int, torch.Tensor]]:
            for start, slab in self.convolved(middle, block.conv2, statistics, activate=True):
                residual = source.read(start, start + slab.shape[2])
                if block.conv_shortcut is not None:
                    residual = block.conv_shortcut(residual)
                yield start, slab.add_(residual)

        return self.keep(with_residual(), source.size, norm, source if block.conv_shortcut is None else None)

    def resample(
        self, source: Activations, resampler: MaisiVaeDownsample3D | MaisiVaeUpsample3D, norm: nn.GroupNorm | None
    ) -> tuple[Activations, GroupStatistics | None]:
        """An up- or a downsampler, and the statistics for the norm that comes next."""
        size = resampled_size(resampler, source.size)
        is_up = isinstance(resampler, MaisiVaeUpsample3D)
        of_slab = upsampled if is_up else downsampled
        # The finer grid has four times the voxels of a plane; downsampling has two planes of it for one.
        plane_values = source.plane_values * (4 if is_up else 2)

        def slabs() -> Iterator[tuple[int, torch.Tensor]]:
            for planes in self.slabs(size, plane_values, multiple=2):
                yield planes.start, of_slab(resampler, source, planes)

        return self.keep(slabs(), size, norm)


def resampled_size(
    resampler: MaisiVaeDownsample3D | MaisiVaeUpsample3D, size: tuple[int, int, int]
) -> tuple[int, int, int]:
    """The size after an up- or a downsampler."""
    if isinstance(resampler, MaisiVaeUpsample3D):
        return tuple(2 * n for n in size)
    return tuple(n // 2 for n in size)


def downsampled(resampler: MaisiVaeDownsample3D, source: Activations, planes: slice) -> torch.Tensor:
    """Planes of the result of a downsampler: each is of two planes and the one behind, or 0 behind the last."""
    return resampler(source.read(2 * planes.start, min(2 * planes.stop + 1, source.size[0])))


def upsampled(resampler: MaisiVaeUpsample3D, source: Activations, planes: slice) -> torch.Tensor:
    """Planes of the result of an upsampler, from an even one to an even one."""
    first, last = planes.start // 2, planes.stop // 2
    is_first, is_last = first == 0, last == source.size[0]
    if resampler.use_conv_transpose:  # the last plane depends on the one behind
        return resampler(source.read(first, min(last + 1, source.size[0])))[:, :, : planes.stop - planes.start]
    slab = source.read(max(first - 1, 0), min(last + 1, source.size[0]))
    slab = resampler.interpolate(slab)
    # Of the two planes beyond each cut the convolution sees the nearer one; the other one lacks its neighbour.
    slab = slab[:, :, 0 if is_first else 1 : slab.shape[2] if is_last else -1]
    return convolve_slab(resampler.conv, slab, is_first, is_last)


def convolve_slab(conv: nn.Module, slab: torch.Tensor, is_first: bool, is_last: bool) -> torch.Tensor:
    """
    A convolution of kernel 3 and padding 1 of a slab (1, C, x, Y, Z).

    The slab comes with the planes before and behind it, which the result is without; at the ends of the volume there
    is none, and 0 is there.
    """
    is_plain = type(conv) is nn.Conv3d and not (
        conv._forward_pre_hooks or conv._forward_hooks or "forward" in vars(conv)
    )
    if not is_plain:  # an adapter or a hook
        return conv(slab)[:, :, 0 if is_first else 1 : slab.shape[2] if is_last else -1]
    if is_first or is_last:
        slab = F.pad(slab, (0, 0, 0, 0, int(is_first), int(is_last)))
    # The result has the channels of a voxel side by side if the weight has.
    weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(slab, weight, conv.bias, padding=(0, 1, 1))


def out_channels(conv: nn.Module) -> int:
    """Of a convolution, also one in an adapter."""
    return getattr(conv, "base_layer", conv).out_channels
