"""The level of the VAE's encoder or decoder with the finest grid, of which nothing is kept."""

from collections.abc import Callable

import torch
from torch import nn

from .group_statistics import GroupStatistics
from .slab_convolution import SlabConvolution


class FinestLevel:
    """
    Features of the finest grid, made when planes of them are read: with all planes that these depend on.

    The statistics of the norms are fixed before, from some planes, and hold for all that is read: where a slab ends
    does not show.

    Args:
        head: gives the features (1, C, x, Y, Z) of a slice of planes before the first norm.
        resnets: the residual blocks.
        out: norm and convolution behind them, if there are any.
        size: of the grid.
    """

    def __init__(
        self,
        head: Callable[[slice], torch.Tensor],
        resnets: nn.ModuleList,
        out: tuple[nn.GroupNorm, nn.Conv3d] | None,
        size: tuple[int, int, int],
    ):
        self.head, self.resnets, self.size = head, resnets, size
        layers = [layer for r in resnets for layer in ((r.norm1, r.conv1), (r.norm2, r.conv2))]
        self.norms, convs = zip(*layers, *([] if out is None else [out]))
        self.convs = [SlabConvolution(conv) for conv in convs]
        self.halo = len(self.convs) + 1  # with the convolution of the head
        self.channels = max(norm.num_channels for norm in self.norms)
        self.statistics: list[GroupStatistics] = []

    def fix_statistics(self, slabs: list[slice]) -> None:
        """Those of all norms, from planes of slabs that are made one at a time."""
        for norm in self.norms:
            statistics = GroupStatistics(norm)
            for planes in slabs:
                statistics.add(self.run(planes, len(self.statistics)))
            self.statistics.append(statistics)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Planes start to stop behind the last layer, (1, C, stop - start, Y, Z)."""
        return self.run(slice(start, stop), len(self.convs))

    def run(self, planes: slice, num_convs: int) -> torch.Tensor:
        """Planes behind the first `num_convs` convolutions, each of which comes after its norm."""
        length = self.size[0]
        start, stop = max(planes.start - num_convs, 0), min(planes.stop + num_convs, length)
        slab = self.head(slice(start, stop))
        for i in range(num_convs):
            resnet = self.resnets[i // 2] if i < 2 * len(self.resnets) else None
            if resnet is not None and i % 2 == 0:
                residual, residual_start = slab, start
            is_first, is_last = start == 0, stop == length
            slab = self.convs[i].in_parts(slab, is_first, is_last, self.statistics[i], resnet is not None)
            start, stop = start + (not is_first), stop - (not is_last)
            if resnet is not None and i % 2 == 1:
                residual = residual[:, :, start - residual_start : stop - residual_start]
                slab += residual if resnet.conv_shortcut is None else resnet.conv_shortcut(residual)
        return slab[:, :, planes.start - start : planes.stop - start]
