"""How much memory an image needs, before it is tried."""

import math

import torch

from ..models.slab_convolution import CPU_SLAB
from ..models.slab_tiling import SLABS_AT_ONCE, kept_values, layers_of
from ..pipelines import MaisiCTPipeline

# Python with torch and diffusers.
PROGRAM = 500e6


def estimate_memory(pipe: MaisiCTPipeline, size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> float:
    """
    Bytes that making one image takes, weights among them: an estimate, for the CPU.

    Decoding is where the most is needed: for the features that are kept from layer to layer, slabs of them, and the
    image with copies of it, in float32.

    Args:
        pipe: with or without its weights.
        size: of the image, in voxels.
        dtype: of the networks.
    """
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    weights = sum(network.num_parameters() for network in networks) * dtype.itemsize
    latent_size = tuple(n // pipe.vae.spatial_compression_ratio for n in size)
    kept = kept_values(layers_of(pipe.vae.decoder.blocks), latent_size) * dtype.itemsize
    return PROGRAM + weights + kept + SLABS_AT_ONCE * CPU_SLAB + 4 * 4 * math.prod(size)
