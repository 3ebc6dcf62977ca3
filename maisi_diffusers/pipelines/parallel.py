"""Work of a pipeline spread over processes, each of which runs the same pipeline on a device of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist


def spread(functions: list[Callable[[], torch.Tensor]], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """What functions give, tensors that are alike: each calls them all, or in a group each process one of them."""
    if group is None or dist.get_world_size(group) < len(functions):
        return [function() for function in functions]
    own = functions[dist.get_rank(group) % len(functions)]().contiguous()
    given = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(given, own, group)
    return given[: len(functions)]


def latents_of_first(latents: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """What the first process of a group has: another GPU rounds otherwise, so that its slabs would not quite meet, and
    may have drawn more from the generator for its label map."""
    if group is not None:
        latents = latents.contiguous()
        dist.broadcast(latents, dist.get_global_rank(group, 0), group)
    return latents


def of_first(values: list[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """What the first process of a group has: another GPU may round to another label map."""
    if group is not None:
        dist.broadcast_object_list(values, dist.get_global_rank(group, 0), group)
    return values
