"""How much memory an image needs, before it is tried."""

import math

import psutil
import torch

from ..pipelines import MaisiCTPipeline
from .wording import size_text

# Decoding is where the most is needed: at the full size, with the channels of the level below, which an upsampler
# leaves. Measured on the CPU for 64^3 to 128^3 voxels, with three VAEs: 3.5 to 3.9 such tensors at once. A run with
# networks of the published size peaked at 5.4 GB for 128 x 128 x 128 voxels and at 3.6 GB for half of them, where this
# says 5.5 and 3.5.
TENSORS_AT_ONCE = 3.6
# Python with torch and diffusers.
PROGRAM = 500e6


def estimate_memory(
    pipe: MaisiCTPipeline, size: tuple[int, int, int], dtype: torch.dtype = torch.float32, tiling: bool = False
) -> float:
    """
    Bytes that making one image takes, weights among them: an estimate, for the CPU.

    Args:
        pipe: with or without its weights.
        size: of the image, in voxels.
        dtype: of the networks.
        tiling: whether the VAE decodes in tiles.
    """
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    weights = sum(network.num_parameters() for network in networks) * dtype.itemsize
    return PROGRAM + weights + estimate_decoding(pipe, size, dtype, tiling)


def estimate_decoding(pipe: MaisiCTPipeline, size: tuple[int, int, int], dtype: torch.dtype, tiling: bool) -> float:
    """Bytes that decoding one image takes, see [`estimate_memory`]."""
    channels = pipe.vae.config.block_out_channels
    decoded = [min(n, tile) for n, tile in zip(size, pipe.vae.tile_sample_size)] if tiling else size
    activations = TENSORS_AT_ONCE * channels[min(1, len(channels) - 1)] * math.prod(decoded) * dtype.itemsize
    return activations + 4 * 4 * math.prod(size)  # the image itself in float32, and copies of it


def memory_warning(pipe: MaisiCTPipeline, latents: torch.Tensor) -> str | None:
    """What is to be said if there seems to be too little memory to decode these latents.

    On the CPU alone, where the system ends a process that takes too much; elsewhere torch raises an error.
    """
    if pipe.device.type != "cpu":
        return None
    size = tuple(n * pipe.vae.spatial_compression_ratio for n in latents.shape[2:])
    free = psutil.virtual_memory().available
    needed = estimate_decoding(pipe, size, pipe.vae.dtype, pipe.vae.use_tiling)
    if needed <= free:
        return None
    message = f"decoding {size_text(size)} voxels takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
    tiled = estimate_decoding(pipe, size, pipe.vae.dtype, tiling=True)
    return message + (f"; with --tiling {tiled / 1e9:.1f}" if tiled < needed else "")
