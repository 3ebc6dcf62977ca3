"""A volume spread over processes along X: each makes the planes of its share, and has one of either neighbour's."""

import torch
from torch import distributed as dist

from .activations import Activations
from .group_statistics import GroupStatistics


class Shares:
    """
    Args:
        group: the processes; `None` for this one alone, which then has all planes.
        num_planes: of the coarsest grid; every process has whole ones of them, and of finer grids what lies in these.

    Raises:
        ValueError: if there are more processes than planes.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_planes: int):
        self.group, self.num_planes = group, num_planes
        self.rank, self.number = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.number > num_planes:
            raise ValueError(
                f"{self.number} processes cannot share a volume whose coarsest grid has {num_planes} planes along X: "
                "start as many processes as planes, or fewer"
            )

    def planes(self, length: int, rank: int | None = None) -> slice:
        """The share of a process, this one if none is given, of a grid with so many planes."""
        rank = self.rank if rank is None else rank
        start, stop = (self.num_planes * r // self.number * (length // self.num_planes) for r in (rank, rank + 1))
        return slice(start, stop)

    def held(self, length: int) -> slice:
        """The share of this process with the planes before and behind it, which convolutions see."""
        own = self.planes(length)
        return slice(max(own.start - 1, 0), min(own.stop + 1, length))

    def exchange(self, features: Activations) -> None:
        """Get the planes before and behind the share from the neighbours, and give them theirs."""
        own = self.planes(features.size[0])
        transfers, received = [], {}
        for neighbour, sent, wanted in (
            (self.rank - 1, own.start, own.start - 1),
            (self.rank + 1, own.stop - 1, own.stop),
        ):
            if 0 <= neighbour < self.number:
                peer = dist.get_global_rank(self.group, neighbour)
                plane = features.read(sent, sent + 1).contiguous()
                received[wanted] = torch.empty_like(plane)
                transfers.append(dist.P2POp(dist.isend, plane, peer, self.group))
                transfers.append(dist.P2POp(dist.irecv, received[wanted], peer, self.group))
        for transfer in dist.batch_isend_irecv(transfers) if transfers else []:
            transfer.wait()
        for plane, values in received.items():
            features.write(plane, values)

    def merge(self, statistics: GroupStatistics, device: torch.device) -> None:
        """Make statistics of shares those of the whole, the same in all processes."""
        if self.number == 1:
            return
        own = statistics.pack().to(device)
        parts = [torch.empty_like(own) for _ in range(self.number)]
        dist.all_gather(parts, own, self.group)
        statistics.reset()
        for part in parts:
            statistics.merge(part.cpu())

    def gather(self, volume: torch.Tensor) -> torch.Tensor:
        """Fill in what other processes made of a volume (1, C, X, Y, Z)."""
        for rank in range(self.number) if self.number > 1 else []:
            planes = self.planes(volume.shape[2], rank)
            part = volume[:, :, planes].contiguous()
            # As bytes: of integers the backends do not know all.
            dist.broadcast(part.view(torch.uint8), dist.get_global_rank(self.group, rank), self.group)
            volume[:, :, planes] = part
        return volume
