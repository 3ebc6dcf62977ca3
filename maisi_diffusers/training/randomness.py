"""Draws that depend on the seed, the epoch and the case, and on nothing else.

What a case is trained with (its latent's draw, noise, timestep, augmentation) must not depend on which process has it,
in which batch it is, or whether the run was interrupted before. So there is no state to save: each case of each epoch
has a generator of its own.
"""

import hashlib
from collections.abc import Callable

import torch


def case_seed(seed: int, epoch: int, index: int, purpose: str = "") -> int:
    """Seed of a case in an epoch, the same on every machine; `purpose` tells independent draws apart."""
    digest = hashlib.sha256(f"{seed} {epoch} {index} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # a seed has 63 bits


def draw_each(seeds: torch.Tensor, draw: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
    """Stack what is drawn with a CPU generator of each seed: (N, ...) for `seeds` (N,)."""
    return torch.stack([draw(torch.Generator().manual_seed(int(seed))) for seed in seeds])
