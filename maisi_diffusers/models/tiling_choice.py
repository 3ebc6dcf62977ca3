"""Whether the VAE runs in one piece or in slabs, by the memory that is free."""

import warnings

import torch

from ..memory import free_memory
from .slab_tiling import SlabTiling, kept_values, layers_of, widest_slabs
from .vae_blocks_maisi import MaisiDecoder3D, MaisiEncoder3D

# One piece takes so many times what slabs keep: at the published architecture 3.5 on a GPU, encoder and decoder in any
# dtype, with what cuDNN orders anew; and a margin.
ONE_PIECE = 3.8


def choose_tiling(network: MaisiEncoder3D | MaisiDecoder3D, x: torch.Tensor) -> SlabTiling | None:
    """
    How to run a network with the result of the whole: `None` for one piece, else in slabs, with what they keep on the
    host or in a scratch file if there is no room for it on the device, and a quarter of it kept if there is none for
    the file.

    On the CPU slabs are faster, and their group norms more precise: those of torch are off by 3e-4 where the channels
    of a voxel lie side by side, which convolutions there want. Layers that are offloaded or cast one by one need one
    piece.

    Args:
        network: the encoder or the decoder.
        x (N, C, X, Y, Z): its input.
    """
    if needs_its_layers_called(network, x.device):
        return None
    is_on_cpu = x.device.type == "cpu"
    free = free_memory(x.device)
    steps, size = layers_of(network.blocks), tuple(x.shape[2:])
    kept = kept_values(steps, size) * x.element_size()
    if not is_on_cpu and ONE_PIECE * len(x) * kept <= free:
        return None
    exact = SlabTiling(None, keeps_finest=True)
    try:
        exact.place(kept, widest_slabs(steps, size), x.device)
    except OSError:
        warnings.warn(
            f"neither the memory nor {exact.folder} has room for the {kept / 1e9:.0f} GB of features that the VAE "
            "keeps: it makes most of them several times, in more time; vae.enable_exact_tiling(folder=...) takes "
            "another folder",
            stacklevel=2,
        )
        return SlabTiling(None, keeps_finest=False)
    return exact


def needs_its_layers_called(network: MaisiEncoder3D | MaisiDecoder3D, device: torch.device) -> bool:
    """Whether hooks cast weights, or bring them to a device from another one, when a layer is called."""
    if any(hasattr(module, "_diffusers_hook") for module in network.modules()):
        return True
    is_elsewhere = any(parameter.device != device for parameter in network.parameters())
    return is_elsewhere and any(hasattr(module, "_hf_hook") for module in network.modules())
