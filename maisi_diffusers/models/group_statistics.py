"""Group norm of a volume that is seen in slabs: first its mean and variance, then their use."""

import torch
from torch import nn


class GroupStatistics:
    """
    Mean and variance of every group of channels, of slab after slab.

    Merged in float64 as [Chan et al., 1983](https://doi.org/10.1080/00031305.1983.10483115) do, so that they are those
    of the whole, however it is cut.
    """

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, slab: torch.Tensor) -> None:
        """One more slab, (1, C, x, Y, Z)."""
        groups = slab[0].unflatten(0, (self.norm.num_groups, -1)).float()
        variance, mean = torch.var_mean(groups, dim=(1, 2, 3, 4), correction=0)
        variance, mean = variance.double().cpu(), mean.double().cpu()
        count = groups[0].numel()
        total = self.count + count
        change = mean - self.mean
        self.squares = self.squares + variance * count + change.square() * (self.count * count / total)
        self.mean = self.mean + change * (count / total)
        self.count = total

    def normalize(self, slab: torch.Tensor) -> torch.Tensor:
        """The norm of a slab (1, C, x, Y, Z) by the statistics of all that were added; in place."""
        deviation = (self.squares / self.count + self.norm.eps).sqrt()
        per_channel = self.norm.num_channels // self.norm.num_groups
        mean, deviation = (value.repeat_interleave(per_channel) for value in (self.mean, deviation))
        scale, shift = 1 / deviation, -mean / deviation
        if self.norm.affine:
            weight, bias = (value.double().cpu() for value in (self.norm.weight, self.norm.bias))
            scale, shift = scale * weight, shift * weight + bias
        shape = (1, -1, 1, 1, 1)
        scale, shift = (value.float().to(slab.device).view(shape) for value in (scale, shift))
        if slab.dtype == torch.float32:
            return slab.mul_(scale).add_(shift)
        return slab.float().mul_(scale).add_(shift).to(slab.dtype)
