"""Draws that depend on the seed, the epoch and the case, and on nothing else.

What a case is trained with (its latent's draw, noise, timestep, augmentation) must not depend on which process has it,
in which batch it is, or whether the run was interrupted before. So there is no state to save: each case of each epoch
has generators of its own.
"""

import hashlib

import torch


def case_seed(seed: int, epoch: int, index: int, purpose: str) -> int:
    """Seed of a case in an epoch, the same on every machine; `purpose` tells independent draws apart."""
    digest = hashlib.sha256(f"{seed} {epoch} {index} {purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # a seed has 63 bits


def case_generator(seed: int, epoch: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator with [`case_seed`]."""
    return torch.Generator().manual_seed(case_seed(seed, epoch, index, purpose))
