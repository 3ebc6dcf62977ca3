"""
The VAE's encoder and decoder in slabs along X: every convolution sees its true neighbours, and a group norm has the
same statistics in every slab, so that nothing shows where slabs meet.

Layer by layer, each through the whole volume before the next one begins, the statistics are those of the whole, and
the result is that of the whole. Two and a half volumes of features are kept at most, since a residual block writes its
result over its input: on the device, on the host or in a scratch file, wherever they fit. The finest level, with three
quarters of what would be kept, can be left out of this: for each of its norms it is then made anew from what the other
levels leave, in slabs that go through all its layers.
"""

import errno
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import distributed as dist
from torch import nn

from ..memory import scratch_folder, usable_memory
from .activations import Activations, Given
from .finest_level import FinestLevel, norms_of
from .group_statistics import GroupStatistics
from .shares import Shares
from .slab_convolution import CPU_PLANES, SlabConvolution, out_channels, planes_in_cache
from .slab_layers import convolved, downsampled, resampled_size, upsampled
from .vae_blocks_maisi import (
    MaisiDecoder3D,
    MaisiEncoder3D,
    MaisiVaeBlock3D,
    MaisiVaeDownsample3D,
    MaisiVaeResnetBlock3D,
    MaisiVaeUpsample3D,
)

# Slabs at once, in float32, which statistics are made in: what is read, padded and convolved, the residual, deviations
# from the mean, and what the convolution itself takes. Measured.
SLABS_AT_ONCE = 6
# Of them, in the dtype of features, beside the most of these that are ever kept: less than elsewhere. Measured.
SLABS_BESIDE_MOST = 4
NEIGHBOURS = 2  # planes on both sides that come with a slab
LEAST = 0.75  # what thin slabs really take of that: large planes are convolved in parts

Slabs = Iterator[tuple[int, torch.Tensor]]
"""First plane and slab (1, C, x, Y, Z), one after the other; or slabs of several volumes."""


class SlabTiling:
    """
    Runs [`MaisiEncoder3D`] or [`MaisiDecoder3D`] in slabs.

    Args:
        memory: bytes that features may take at once on the device; if not given, what is free there at each call.
        keeps_finest: whether the features of the finest level are kept, or made anew for each norm.
        folder: where a scratch file is made; [`scratch_folder`] if not given.
        group: processes that share the slabs: each is called with the same, and gets the whole result.
    """

    def __init__(
        self,
        memory: int | None,
        keeps_finest: bool,
        folder: str | os.PathLike | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.memory, self.keeps_finest, self.group = memory, keeps_finest, group
        self.folder = scratch_folder() if folder is None else folder

    @torch.no_grad()
    def encode(self, encoder: MaisiEncoder3D, x: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of one sample, (1, C, X, Y, Z)."""
        blocks, size = list(encoder.blocks), tuple(x.shape[2:])
        self.shares = Shares(self.group, size[0] // 2 ** (len(blocks) - 1))
        finest, image, level_slabs = None, Given(x), 0
        if not self.keeps_finest:
            finest = blocks.pop(0)
            level_slabs = bytes_of_level(norms_of(finest.resnets), 2, math.prod(size[1:]))
            size = resampled_size(finest.resampler, size)
        steps = layers_of(blocks)
        self.plan(steps, size, x, level_slabs)

        if finest is None:
            slabs = self.convolved(image, encoder.conv_in)
        else:
            head = partial(convolved, SlabConvolution(encoder.conv_in), image)
            slabs = self.downsampled(self.fixed(FinestLevel(head, finest.resnets, None, image.size)), finest.resampler)
        features, statistics = self.through(steps, slabs, size, encoder.conv_norm_out)
        return self.join(self.convolved(features, encoder.conv_out, statistics), features.size)

    @torch.no_grad()
    def decode(
        self,
        decoder: MaisiDecoder3D,
        z: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What becomes of slabs of what the decoder makes of one sample, (1, C, X, Y, Z)."""
        blocks, size = list(decoder.blocks), tuple(z.shape[2:])
        self.shares = Shares(self.group, size[0])
        finest, level_slabs = None, 0
        if not self.keeps_finest:
            finest = blocks.pop()
            norms = [*norms_of(finest.resnets), decoder.conv_norm_out]
            level_slabs = bytes_of_level(norms, 1, 4 ** len(blocks) * math.prod(size[1:]))
        steps = layers_of(blocks)
        upsampler = None if finest is None else steps.pop()
        self.plan(steps, size, z, level_slabs)

        slabs = self.convolved(Given(z), decoder.conv_in)
        features, statistics = self.through(steps, slabs, size, decoder.conv_norm_out if finest is None else None)
        if finest is None:
            slabs, size = self.convolved(features, decoder.conv_out, statistics), features.size
        else:
            head = partial(upsampled, upsampler, SlabConvolution(upsampler.conv), features)
            size = resampled_size(upsampler, features.size)
            out = (decoder.conv_norm_out, decoder.conv_out)
            level = self.fixed(FinestLevel(head, finest.resnets, out, size))
            cut = self.cut(size, level.channels, level.remembered_channels)
            slabs = ((planes.start, level.read(planes.start, planes.stop)) for planes in cut)
        return self.join(((start, finish(slab)) for start, slab in slabs), size)

    def plan(self, steps: list[nn.Module], size: tuple[int, int, int], x: torch.Tensor, level_slabs: int) -> None:
        """
        Where the features of layers are kept, and what slabs may take.

        Args:
            steps: the layers.
            size: of the grid of the first of them.
            x: what is encoded or decoded.
            level_slabs: bytes that the thinnest slabs of the finest level take, if that is not kept.
        """
        held = self.shares.held(size[0])
        kept = kept_values(steps, (held.stop - held.start, *size[1:])) * x.element_size()
        self.device = x.device
        slabs = widest_slabs(steps, size)
        self.where, self.for_slabs = self.place(kept, max(slabs, level_slabs), x.device)
        least = max(int(LEAST * slabs * (1 + NEIGHBOURS) / (CPU_PLANES + NEIGHBOURS)), level_slabs)
        if self.memory is not None and self.for_slabs < least:
            warnings.warn(
                f"memory={self.memory} is less than one plane of this volume and its neighbours take in all layers, "
                f"about {least}: more than was allowed is taken",
                stacklevel=2,
            )

    def place(self, kept: int, slabs: int, device: torch.device) -> tuple[torch.device | str | os.PathLike, int]:
        """
        A device or the folder for so many bytes of features, beside which slabs of so many fit on the device, and what
        is then left for these there.

        Raises:
            OSError: the folder is needed, and its disk has no room for them.
        """
        memory = usable_memory(device) if self.memory is None else self.memory
        if kept + slabs <= memory:
            return device, memory - kept
        if device.type != "cpu" and kept <= usable_memory(torch.device("cpu")):
            return torch.device("cpu"), memory
        if kept > (free := shutil.disk_usage(self.folder).free):
            remedy = "choose another folder= (or $TMPDIR), allow more memory="
            if self.keeps_finest:
                remedy += ", or call enable_tiling, which keeps a quarter of them"
            told = f"{free / 1e9:.1f} GB are free, and the VAE keeps {kept / 1e9:.1f} GB of features: {remedy}"
            raise OSError(errno.ENOSPC, told, str(self.folder))
        return self.folder, memory

    def through(
        self, steps: list[nn.Module], slabs: Slabs, size: tuple[int, int, int], last_norm: nn.GroupNorm | None
    ) -> tuple[Activations, GroupStatistics | None]:
        """Layer by layer, of features that come in slabs; with the statistics for the norm behind the last, if any."""
        norms = [step.norm1 if isinstance(step, MaisiVaeResnetBlock3D) else None for step in steps] + [last_norm]
        features, statistics = self.keep(slabs, size, norms[0])
        for step, norm in zip(steps, norms[1:]):
            if isinstance(step, MaisiVaeResnetBlock3D):
                features, statistics = self.resnet(features, statistics, step, norm)
            else:
                features.spare = None
                resampled = self.upsampled if isinstance(step, MaisiVaeUpsample3D) else self.downsampled
                size = resampled_size(step, features.size)
                features, statistics = self.keep(resampled(features, step), size, norm)
        return features, statistics

    def resnet(
        self, source: Activations, statistics: GroupStatistics, block: MaisiVaeResnetBlock3D, norm: nn.GroupNorm | None
    ) -> tuple[Activations, GroupStatistics | None]:
        """A residual block, in place of its input as far as there is room; and the statistics for the next norm."""
        channels, size = out_channels(block.conv2), source.size
        first = self.convolved(source, block.conv1, statistics, activate=True)
        if block.conv_shortcut is None:
            middle, residual = source.spare or source.like(channels, self.where), source
            source.spare = None  # else each of the two would keep the other one alive
            _, statistics = self.keep(first, size, block.norm2, [middle])
        else:
            source.spare = None
            room = source if source.channels >= 2 * channels else source.like(2 * channels, self.where)
            middle, residual = room.split(channels)
            both = (
                (start, slab, block.conv_shortcut(source.read(start, start + slab.shape[2]))) for start, slab in first
            )
            _, statistics = self.keep(both, size, block.norm2, [middle, residual])

        second = self.convolved(middle, block.conv2, statistics, activate=True)
        summed = ((start, slab.add_(residual.read(start, start + slab.shape[2]))) for start, slab in second)
        _, statistics = self.keep(summed, size, norm, [middle])
        middle.spare = residual
        return middle, statistics

    def keep(
        self,
        slabs: Slabs,
        size: tuple[int, int, int],
        norm: nn.GroupNorm | None,
        targets: list[Activations] | None = None,
    ) -> tuple[Activations, GroupStatistics | None]:
        """
        Keep features that come in slabs.

        Args:
            slabs: of one volume or of several.
            size: of the volumes.
            norm: that statistics of the first volume are made for.
            targets: where to, even over what the slabs are made from; new if not given.
        """
        statistics = None if norm is None else GroupStatistics(norm)
        last = None
        for start, *parts in slabs:
            if targets is None:
                planes = self.shares.held(size[0])
                targets = [
                    Activations(part.shape[1], size, part.dtype, part.device, self.where, planes) for part in parts
                ]
            if statistics is not None:
                statistics.add(parts[0])
            # The last plane of a slab is written after the next slab was made: maybe from what is there in its place.
            for i, (target, part) in enumerate(zip(targets, parts)):
                if last is not None:
                    target.write(start - 1, last[i])
                target.write(start, part[:, :, :-1])
            last = [part[:, :, -1:].clone() for part in parts]
        for target, plane in zip(targets, last):
            target.write(self.shares.planes(size[0]).stop - 1, plane)
        self.shares.exchange(targets[0])
        if statistics is not None:
            self.shares.merge(statistics, self.device)
        return targets[0], statistics

    def convolved(
        self,
        source: Activations,
        conv: nn.Conv3d,
        statistics: GroupStatistics | None = None,
        activate: bool = False,
    ) -> Slabs:
        """Norm, SiLU and convolution, as far as they are wanted."""
        conv = SlabConvolution(conv)
        for planes in self.cut(source.size, max(source.channels, conv.out_channels)):
            slab = source.read(max(planes.start - 1, 0), min(planes.stop + 1, source.size[0]))
            yield planes.start, conv(slab, planes.start == 0, planes.stop == source.size[0], statistics, activate)

    def upsampled(self, source: Activations, upsampler: MaisiVaeUpsample3D) -> Slabs:
        conv = SlabConvolution(upsampler.conv)
        for planes in self.cut(resampled_size(upsampler, source.size), source.channels, multiple=2):
            yield planes.start, upsampled(upsampler, conv, source, planes)

    def downsampled(self, source: Activations | FinestLevel, downsampler: MaisiVaeDownsample3D) -> Slabs:
        for planes in self.cut(source.size, source.channels, source.remembered_channels, multiple=2):
            coarse = slice(planes.start // 2, planes.stop // 2)
            yield coarse.start, downsampled(downsampler, source, coarse)

    def cut(
        self, size: tuple[int, int, int], channels: int, remembered_channels: int = 0, multiple: int = 1
    ) -> Iterator[slice]:
        """
        Slabs of a volume, of the share of this process, that are as thick as the memory lets.

        Args:
            size: of the volume.
            channels: of the features.
            remembered_channels: of features beside a slab, that are kept while it is made.
            multiple: of which each is a multiple of planes.
        """
        thickness = self.thickness(size, channels, remembered_channels, multiple)
        share = self.shares.planes(size[0])
        for start in range(share.start, share.stop, thickness):
            yield slice(start, min(start + thickness, share.stop))

    def thickness(
        self, size: tuple[int, int, int], channels: int, remembered_channels: int = 0, multiple: int = 1
    ) -> int:
        """Planes of a slab of [`cut`]."""
        voxels = math.prod(size[1:])
        planes = int(self.for_slabs // bytes_of_slabs(channels, remembered_channels, voxels)) - NEIGHBOURS
        if remembered_channels == 0:  # one convolution, not a chain of them that has its own parts
            planes = min(planes, planes_in_cache(channels, voxels, self.device))
        return max(planes // multiple, 1) * multiple

    def fixed(self, level: FinestLevel) -> FinestLevel:
        """A level with its statistics."""
        level.fix_statistics(self.thickness(level.size, level.channels, level.remembered_channels))
        return level

    def join(self, slabs: Slabs, size: tuple[int, int, int]) -> torch.Tensor:
        """The volume (1, C, X, Y, Z) of a size that slabs make up."""
        volume = None
        for start, slab in slabs:
            if volume is None:
                volume = torch.empty((1, slab.shape[1], *size), dtype=slab.dtype, device=slab.device)
            volume[:, :, start : start + slab.shape[2]] = slab
        return self.shares.gather(volume)


def kept_values(steps: list[nn.Module], size: tuple[int, int, int]) -> int:
    """How many values of features are kept at most while layers run, the first of them on a grid of a size."""
    # Channels that there is room for where the features are, and in another place, unless this shares the room.
    room, spare, is_shared = steps[0].norm1.num_channels, 0, False
    largest = 0
    for step in steps:
        if isinstance(step, MaisiVaeResnetBlock3D):
            before, behind = step.norm1.num_channels, step.norm2.num_channels
            wanted = 0
            if step.conv_shortcut is not None:
                spare, is_shared = 0, True
                wanted = 0 if before >= 2 * behind else 2 * behind
            elif not is_shared and not spare:
                room, spare = behind, room
            values = (room + spare + wanted) * math.prod(size)
            room = wanted or room
        else:
            next_size = resampled_size(step, size)
            values = room * math.prod(size) + out_channels(step.conv) * math.prod(next_size)
            size, room, spare, is_shared = next_size, out_channels(step.conv), 0, False
        largest = max(largest, values)
    return largest


def widest_slabs(steps: list[nn.Module], size: tuple[int, int, int]) -> int:
    """Bytes of slabs of some planes of the widest layer, the first of them on a grid of a size."""
    widest = 0
    for step in steps:
        if isinstance(step, MaisiVaeResnetBlock3D):
            channels = max(step.norm1.num_channels, step.norm2.num_channels)
        else:
            size, channels = resampled_size(step, size), out_channels(step.conv)
        widest = max(widest, bytes_of_slabs(channels, 0, math.prod(size[1:])))
    return (CPU_PLANES + NEIGHBOURS) * widest


def slab_memory(
    decoder: MaisiDecoder3D, size: tuple[int, int, int], keeps_finest: bool, dtype: torch.dtype
) -> tuple[int, int]:
    """
    What decoding in slabs takes on the CPU: bytes of features that are kept, and of slabs; at least, if the finest
    level is not kept.

    Args:
        decoder: the decoder.
        size: of the latent.
        keeps_finest: see [`SlabTiling`].
        dtype: of its weights.
    """
    scale = 2 ** (len(decoder.blocks) - 1)
    voxels = scale**2 * math.prod(size[1:])
    norms = [*norms_of(decoder.blocks[-1].resnets), decoder.conv_norm_out]
    if keeps_finest:
        steps, channels = layers_of(decoder.blocks), max(norm.num_channels for norm in norms)
        planes = min(planes_in_cache(channels, voxels, torch.device("cpu")), scale * size[0])
        slabs = (planes + NEIGHBOURS) * SLABS_BESIDE_MOST * channels * voxels * dtype.itemsize
    else:
        steps, slabs = layers_of(decoder.blocks[:-1])[:-1], bytes_of_level(norms, 1, voxels)
    return kept_values(steps, size) * dtype.itemsize, slabs


def bytes_of_slabs(channels: int, remembered_channels: int, voxels: int) -> int:
    """What a plane of so many voxels takes in all slabs that there are at once."""
    return (SLABS_AT_ONCE * channels + remembered_channels) * voxels * torch.float32.itemsize


def bytes_of_level(norms: list[nn.GroupNorm], planes: int, voxels: int) -> int:
    """What the slabs of a [`FinestLevel`] with these norms take, of so many planes of so many voxels."""
    channels = [norm.num_channels for norm in norms]
    return (planes + NEIGHBOURS) * bytes_of_slabs(max(channels), sum(channels), voxels)


def layers_of(blocks: list[MaisiVaeBlock3D]) -> list[nn.Module]:
    """Residual blocks and resamplers in the order they run."""
    return [layer for block in blocks for layer in (*block.resnets, block.resampler) if layer is not None]
