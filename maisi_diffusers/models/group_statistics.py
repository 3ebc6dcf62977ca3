"""Group norm of a volume that is seen in slabs: first its mean and variance, then their use."""

import torch
import torch.nn.functional as F
from torch import nn

# Voxels that the CPU adds up in float32, one after the other: of many more a sum is off by what is seen in the result,
# and they leave the cache. Other devices add up in a tree.
ROWS = 8192


class GroupStatistics:
    """
    Mean and variance of every channel, of slab after slab, and of them those of every group.

    Merged in float64 as [Chan et al., 1983](https://doi.org/10.1080/00031305.1983.10483115) do, so that they are those
    of the whole, however it is cut.
    """

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.reset()

    def reset(self) -> None:
        """Forget all slabs."""
        # Of each channel: the number of voxels, their mean, and the sum of squares of their deviations from it.
        self.count, self.mean, self.squares = torch.zeros(3, self.norm.num_channels, dtype=torch.float64)

    def add(self, slab: torch.Tensor) -> None:
        """One more slab, (1, C, x, Y, Z)."""
        voxels = slab[0].permute(1, 2, 3, 0).flatten(0, 2)  # no copy where channels lie side by side
        for part in voxels.split(ROWS if slab.device.type == "cpu" else len(voxels)):
            part = part.float()
            mean = part.sum(0) / len(part)  # a product with ones would be rounded to 16 bits under autocast
            squares = (part - mean).square_().sum(0)
            self.merge(torch.stack([torch.full_like(mean, len(part)), mean, squares]))

    def merge(self, other: torch.Tensor) -> None:
        """Statistics of others, as [`pack`] gives them."""
        count, mean, squares = other.cpu().double()  # in this order: not every device has float64
        total = self.count + count
        change = mean - self.mean
        self.squares = self.squares + squares + change.square() * (self.count * count / total)
        self.mean = self.mean + change * (count / total)
        self.count = total

    def pack(self) -> torch.Tensor:
        """(3, C) in float64 on the CPU."""
        return torch.stack([self.count, self.mean, self.squares])

    def normalize(self, slab: torch.Tensor, out: torch.Tensor, activate: bool) -> None:
        """Norm of a slab (1, C, x, Y, Z) by the statistics of all that were added, and SiLU if wanted, into a slab."""
        groups = self.mean.view(self.norm.num_groups, -1)
        mean = groups.mean(1, keepdim=True)
        squares = (self.squares / self.count).view_as(groups) + (groups - mean).square()
        deviation = (squares.mean(1, keepdim=True) + self.norm.eps).sqrt()
        scale, shift = (value.expand_as(groups).flatten() for value in (1 / deviation, -mean / deviation))
        if self.norm.affine:
            weight, bias = (value.cpu().double() for value in (self.norm.weight, self.norm.bias))
            scale, shift = scale * weight, shift * weight + bias
        scale, shift = (value.float().to(slab.device)[:, None, None] for value in (scale, shift))
        for plane, plane_out in zip(slab[0].unbind(1), out[0].unbind(1)):  # from step to step it stays in the cache
            normal = torch.addcmul(shift, plane.float(), scale)
            plane_out.copy_(F.silu(normal, inplace=True) if activate else normal)
