"""Whether the VAE runs in one piece or in slabs, by the memory that is free."""

import psutil
import torch

from .slab_tiling import SlabTiling, kept_values, layers_of
from .vae_blocks_maisi import MaisiDecoder3D, MaisiEncoder3D

# One piece takes so many times what slabs keep: measured on the CPU, 3.6 tensors of the finest level.
ONE_PIECE = 3.5
# Of the free memory; the rest is for what else needs some.
SHARE = 0.8


def choose_tiling(network: MaisiEncoder3D | MaisiDecoder3D, x: torch.Tensor) -> SlabTiling | None:
    """
    How to run a network: `None` for one piece, as always where layers are offloaded or cast one by one.

    On the CPU slabs are faster, and their group norms more precise: those of torch are off by 3e-4 where the channels
    of a voxel lie side by side, which convolutions there want.

    Args:
        network: the encoder or the decoder.
        x (N, C, X, Y, Z): its input.
    """
    # Hooks that bring weights to where they are wanted wait for layers to be called.
    if any(hasattr(module, hook) for module in network.modules() for hook in ("_hf_hook", "_diffusers_hook")):
        return None
    is_on_cpu = x.device.type == "cpu"
    free = psutil.virtual_memory().available if is_on_cpu else torch.accelerator.get_memory_info(x.device)[0]
    layers, size = layers_of(network.blocks), tuple(x.shape[2:])
    if not is_on_cpu and ONE_PIECE * len(x) * kept_values(layers, size) * x.element_size() <= free:
        return None
    exact = SlabTiling(int(SHARE * free), is_exact=True)
    exact.plan(layers, size, x)
    return exact if isinstance(exact.where, torch.device) else SlabTiling(exact.memory, is_exact=False)
