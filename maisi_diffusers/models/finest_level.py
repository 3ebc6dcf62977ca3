"""The level of the VAE's encoder or decoder with the finest grid, of which only what is still to be read is kept."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .group_statistics import GroupStatistics
from .slab_convolution import SlabConvolution

Make = Callable[[slice], torch.Tensor]
"""A slice along X -> features of its planes, (1, C, x, Y, Z)."""


class RollingPlanes:
    """Features along X that are made from front to back, each plane once, and forgotten behind what is read."""

    def __init__(self, make: Make):
        self.make = make
        self.start, self.planes = 0, None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Planes start to stop, (1, C, stop - start, Y, Z). Those before can never be read again."""
        kept, made = None, start
        if self.planes is not None:
            kept, made = self.planes[:, :, start - self.start :], self.start + self.planes.shape[2]
        if made < stop:
            # A copy, so that the planes behind are let go before others are made.
            kept = None if kept is None or made == start else kept.clone()
            self.planes = None
            new = self.make(slice(made, stop))
            kept = new if kept is None else joined(kept, new)
        self.start, self.planes = start, kept
        return self.planes[:, :, : stop - start]


class FinestLevel:
    """
    Features of the finest grid, made from front to back while planes of them are read.

    The statistics of the norms are fixed before and hold for all that is read: where a slab ends does not show.

    Args:
        head: makes the features before the first norm; in any order.
        resnets: the residual blocks.
        out: norm and convolution behind them, if there are any.
        size: of the grid.
    """

    def __init__(
        self,
        head: Make,
        resnets: nn.ModuleList,
        out: tuple[nn.GroupNorm, nn.Conv3d] | None,
        size: tuple[int, int, int],
    ):
        self.head, self.resnets, self.size = head, resnets, size
        convs = [conv for resnet in resnets for conv in (resnet.conv1, resnet.conv2)]
        self.norms = norms_of(resnets)
        if out is not None:
            self.norms.append(out[0])
            convs.append(out[1])
        self.convs = [SlabConvolution(conv) for conv in convs]
        self.channels = max(norm.num_channels for norm in self.norms)
        self.remembered_channels = sum(norm.num_channels for norm in self.norms)

    def fix_statistics(self, thickness: int) -> None:
        """Those of all norms, to be called before planes are read: of each, all before it is made anew in slabs."""
        statistics = []
        for i, norm in enumerate(self.norms):
            of_norm, features = GroupStatistics(norm), self.chain(i, statistics)
            for start in range(0, self.size[0], thickness):
                of_norm.add(features.read(start, min(start + thickness, self.size[0])))
            statistics.append(of_norm)
        self.features = self.chain(len(self.convs), statistics)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Planes start to stop behind the last layer, (1, C, stop - start, Y, Z); those before never again."""
        return self.features.read(start, stop)

    def chain(self, num_convs: int, statistics: list[GroupStatistics]) -> RollingPlanes:
        """The features behind so many convolutions, each of which comes after a norm with its statistics."""
        features = before = RollingPlanes(self.head)
        for i in range(num_convs):
            block = self.resnets[i // 2] if i < 2 * len(self.resnets) else None
            make = partial(convolve, self.convs[i], features, statistics[i], block is not None, self.size[0])
            if block is not None and i % 2 == 1:
                make = partial(add_residual, make, before, block.conv_shortcut)
            before, features = features, RollingPlanes(make)
        return features


def norms_of(resnets: nn.ModuleList) -> list[nn.GroupNorm]:
    """In the order they run."""
    return [norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2)]


def convolve(
    conv: SlabConvolution,
    source: RollingPlanes,
    statistics: GroupStatistics,
    activate: bool,
    length: int,
    planes: slice,
) -> torch.Tensor:
    """Planes behind a norm and its convolution, of a grid of so many along X, made of the features before them."""
    is_first, is_last = planes.start == 0, planes.stop == length
    slab = source.read(planes.start - (not is_first), planes.stop + (not is_last))
    return conv.in_parts(slab, is_first, is_last, statistics, activate)


def add_residual(make: Make, before_block: RollingPlanes, shortcut: nn.Module | None, planes: slice) -> torch.Tensor:
    """Planes behind a residual block, of the branch that `make` makes."""
    slab = make(planes)  # first of all: it reads planes of the block's input from further in front
    residual = before_block.read(planes.start, planes.stop)
    return slab.add_(residual if shortcut is None else shortcut(residual))


def joined(front: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Planes after planes, with the channels of a voxel side by side, as convolutions on the CPU want them."""
    _, channels, planes, *size = front.shape
    result = front.new_empty(1, planes + back.shape[2], *size, channels).permute(0, 4, 1, 2, 3)
    result[:, :, :planes], result[:, :, planes:] = front, back
    return result
