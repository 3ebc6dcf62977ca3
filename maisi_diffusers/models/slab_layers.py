"""Layers of the VAE for a slab of a volume, planes along X, each with the neighbours that it depends on."""

import torch

from .activations import Activations
from .slab_convolution import SlabConvolution
from .vae_blocks_maisi import MaisiVaeDownsample3D, MaisiVaeUpsample3D


def resampled_size(
    resampler: MaisiVaeDownsample3D | MaisiVaeUpsample3D, size: tuple[int, int, int]
) -> tuple[int, int, int]:
    """The size after an up- or a downsampler."""
    if isinstance(resampler, MaisiVaeUpsample3D):
        return tuple(2 * n for n in size)
    return tuple(n // 2 for n in size)


def convolved(conv: SlabConvolution, source: Activations, planes: slice) -> torch.Tensor:
    """Planes of the result of a convolution."""
    start, stop, length = planes.start, planes.stop, source.size[0]
    slab = source.read(max(start - 1, 0), min(stop + 1, length))
    return conv.in_parts(slab, start == 0, stop == length)


def downsampled(resampler: MaisiVaeDownsample3D, source: Activations, planes: slice) -> torch.Tensor:
    """Planes of the result of a downsampler: each is of two planes and the one behind, or 0 behind the last."""
    return resampler(source.read(2 * planes.start, min(2 * planes.stop + 1, source.size[0])))


def upsampled(
    resampler: MaisiVaeUpsample3D, conv: SlabConvolution, source: Activations, planes: slice
) -> torch.Tensor:
    """Planes of the result of an upsampler, whose convolution has been prepared."""
    first, last = planes.start // 2, -(-planes.stop // 2)  # whose doubles are at least these planes
    is_first, is_last = first == 0, last == source.size[0]
    if resampler.use_conv_transpose:  # the last plane depends on the one behind
        slab = resampler(source.read(first, min(last + 1, source.size[0])))
    else:
        slab = resampler.interpolate(source.read(max(first - 1, 0), min(last + 1, source.size[0])))
        # Of the two planes beyond each cut the convolution sees the nearer one; the other one lacks its neighbour.
        slab = slab[:, :, 0 if is_first else 1 : slab.shape[2] if is_last else -1]
        slab = conv.in_parts(slab, is_first, is_last)
    start = planes.start - 2 * first
    return slab[:, :, start : start + planes.stop - planes.start]
