"""The variational autoencoder of MAISI, for images and for label maps."""

import itertools
from collections.abc import Callable, Iterator
from numbers import Real

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .modeling_maisi import MaisiModelMixin
from .unet_3d_blocks_maisi import MaisiBlock3D, expand_to_levels

# Planes of a volume whose outputs are compared at once. A volume of 256^3 has 8 GB of the mask VAE's 125 outputs.
CLASS_SLAB = 16


class MaisiVaeResnetBlock3D(nn.Module):
    """Residual block: norm, SiLU, convolution, twice."""

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=norm_eps)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = (
            nn.Conv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, X, Y, Z) -> (N, out_channels, X, Y, Z)."""
        residual = hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return residual + hidden_states


class MaisiVaeDownsample3D(nn.Module):
    """Strided convolution on an input padded by 0 before and 1 after on every axis."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) -> (N, C, X/2, Y/2, Z/2)."""
        return self.conv(F.pad(hidden_states, (0, 1) * 3))


class MaisiVaeUpsample3D(nn.Module):
    """Doubling of every axis: trilinear and a convolution, or a transposed convolution."""

    def __init__(self, channels: int, use_conv_transpose: bool):
        super().__init__()
        self.use_conv_transpose = use_conv_transpose
        if use_conv_transpose:
            self.conv = nn.ConvTranspose3d(channels, channels, kernel_size=3, stride=2, padding=1, output_padding=1)
        else:
            self.conv = nn.Conv3d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) -> (N, C, 2X, 2Y, 2Z)."""
        if not self.use_conv_transpose:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="trilinear", align_corners=False)
        return self.conv(hidden_states)


class MaisiVaeBlock3D(MaisiBlock3D):
    """One level of the encoder or the decoder: resnet blocks, then a down- or an upsampler (or none)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        norm_num_groups: int,
        norm_eps: float,
        resampler: nn.Module | None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            MaisiVaeResnetBlock3D(in_channels if i == 0 else out_channels, out_channels, norm_num_groups, norm_eps)
            for i in range(num_layers)
        )
        self.resampler = resampler

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, X, Y, Z) -> (N, out_channels, ...) at half, the same or twice the resolution."""
        for resnet in self.resnets:
            hidden_states = self.run(resnet, hidden_states)
        if self.resampler is not None:
            hidden_states = self.run(self.resampler, hidden_states)
        return hidden_states


class MaisiEncoder3D(nn.Module):
    """Image to latent features. The last norm is followed by the convolution directly, without activation."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: tuple[int, ...],
        norm_num_groups: int,
        norm_eps: float,
    ):
        super().__init__()
        levels = len(block_out_channels)
        self.conv_in = nn.Conv3d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            MaisiVaeBlock3D(
                block_out_channels[max(i - 1, 0)],
                block_out_channels[i],
                layers_per_block[i],
                norm_num_groups,
                norm_eps,
                resampler=MaisiVaeDownsample3D(block_out_channels[i]) if i < levels - 1 else None,
            )
            for i in range(levels)
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[-1], eps=norm_eps)
        self.conv_out = nn.Conv3d(block_out_channels[-1], latent_channels, kernel_size=3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, X, Y, Z) -> (N, latent_channels, X/4, Y/4, Z/4) for three levels."""
        sample = self.conv_in(sample)
        for block in self.down_blocks:
            sample = block(sample)
        return self.conv_out(self.conv_norm_out(sample))


class MaisiDecoder3D(nn.Module):
    """Latent to image. The last norm is followed by the convolution directly, without activation."""

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: tuple[int, ...],
        norm_num_groups: int,
        norm_eps: float,
        use_conv_transpose: bool,
    ):
        super().__init__()
        levels = len(block_out_channels)
        self.conv_in = nn.Conv3d(latent_channels, block_out_channels[-1], kernel_size=3, padding=1)
        self.up_blocks = nn.ModuleList(
            MaisiVaeBlock3D(
                block_out_channels[min(i + 1, levels - 1)],
                block_out_channels[i],
                layers_per_block[i],
                norm_num_groups,
                norm_eps,
                resampler=MaisiVaeUpsample3D(block_out_channels[i], use_conv_transpose) if i > 0 else None,
            )
            for i in reversed(range(levels))
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_out = nn.Conv3d(block_out_channels[0], out_channels, kernel_size=3, padding=1)

    def forward(self, sample: torch.Tensor, return_classes: bool = False) -> torch.Tensor:
        """
        (N, latent_channels, X, Y, Z) -> (N, out_channels, 4X, 4Y, 4Z) for three levels; with `return_classes` the
        index of the largest of these outputs instead, int16 (N, 1, 4X, 4Y, 4Z).
        """
        sample = self.conv_in(sample)
        for block in self.up_blocks:
            sample = block(sample)
        sample = self.conv_norm_out(sample)
        return self.classify(sample) if return_classes else self.conv_out(sample)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The last convolution and the index of the largest output, one slab along X after the other."""
        classes = []
        for start in range(0, features.shape[2], CLASS_SLAB):
            # The planes before and behind a slab are what its outermost ones see of the rest.
            first = max(start - 1, 0)
            outputs = self.conv_out(features[:, :, first : start + CLASS_SLAB + 1])
            slab = outputs[:, :, start - first :][:, :, :CLASS_SLAB]
            classes.append(slab.argmax(dim=1, keepdim=True).to(torch.int16))
        return torch.cat(classes, dim=2)


class AutoencoderKLMaisi(MaisiModelMixin, AutoencoderMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    3D variational autoencoder of MAISI ([Guo et al., 2024](https://arxiv.org/abs/2409.11169)). One class covers the
    image VAE (one channel in 0..1) and the mask VAE (8 label bits in, 125 class logits out).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the reconstruction.
        block_out_channels: channels of every level; each level after the first halves the grid.
        layers_per_block: resnet blocks of every level, one number or one a level.
        latent_channels: channels of the latent.
        norm_num_groups: groups of every group norm.
        norm_eps: epsilon of every group norm.
        use_conv_transpose: upsample by transposed convolutions instead of trilinearly and a convolution.
        scaling_factor: the diffusion model sees `z * scaling_factor`; about 1 over the standard deviation of the
            training latents. `encode` and `decode` work on the unscaled latent.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaisiVaeBlock3D"]
    # Whole halves: the channels differ in every block, and a compiled block is recompiled for each, up to a limit.
    _repeated_blocks = ["MaisiEncoder3D", "MaisiDecoder3D"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out", "quant_conv"]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        layers_per_block: int | tuple[int, ...] = 2,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        use_conv_transpose: bool = False,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        layers_per_block = expand_to_levels(layers_per_block, len(block_out_channels), "layers_per_block")
        self.encoder = MaisiEncoder3D(
            in_channels, latent_channels, block_out_channels, layers_per_block, norm_num_groups, norm_eps
        )
        self.quant_conv = nn.Conv3d(latent_channels, 2 * latent_channels, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(latent_channels, latent_channels, kernel_size=1)
        self.decoder = MaisiDecoder3D(
            latent_channels,
            out_channels,
            block_out_channels,
            layers_per_block,
            norm_num_groups,
            norm_eps,
            use_conv_transpose,
        )

        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_size = (256, 256, 256)
        self.tile_overlap = 0.25

    def enable_tiling(
        self, tile_sample_size: int | tuple[int, int, int] | None = None, tile_overlap: float | None = None
    ) -> None:
        r"""
        Encode and decode in overlapping tiles, blended linearly where they overlap. Memory is bounded by the tile, but
        every tile has group-norm statistics of its own, so the result is near the untiled one, not equal to it.

        Args:
            tile_sample_size: size of a tile in voxels of the image, one number or one an axis; a multiple of the
                compression (4). 256 at first.
            tile_overlap: part of a tile shared with its neighbour, 0 to less than 1. 0.25 at first.
        """
        if tile_sample_size is not None:
            sizes = (tile_sample_size,) * 3 if isinstance(tile_sample_size, Real) else tuple(tile_sample_size)
            ratio = self.spatial_compression_ratio
            if len(sizes) != 3 or any(size <= 0 or size % ratio for size in sizes):
                raise ValueError(
                    f"tile_sample_size={tile_sample_size} is not allowed: give positive multiples of {ratio} voxels, "
                    "one number or three"
                )
            self.tile_sample_size = tuple(int(size) for size in sizes)
        if tile_overlap is not None:
            if not 0 <= tile_overlap < 1:
                raise ValueError(f"tile_overlap={tile_overlap} is not allowed: give a part from 0 to less than 1")
            self.tile_overlap = tile_overlap
        self.use_tiling = True

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_tiling and any(size > tile for size, tile in zip(x.shape[2:], self.tile_sample_size)):
            return self._tiled(self._encode_tile, x, self.tile_sample_size, (1, self.spatial_compression_ratio))
        return self._encode_tile(x)

    def _encode_tile(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x))

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        tile_latent_size = tuple(size // self.spatial_compression_ratio for size in self.tile_sample_size)
        if self.use_tiling and any(size > tile for size, tile in zip(z.shape[2:], tile_latent_size)):
            return self._tiled(self._decode_tile, z, tile_latent_size, (self.spatial_compression_ratio, 1))
        return self._decode_tile(z)

    def _decode_tile(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _tiled(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        tile_size: tuple[int, int, int],
        scale: tuple[int, int],
    ) -> torch.Tensor:
        """
        Apply `function` to overlapping tiles of `x` and blend its results.

        Args:
            function: maps a tile to its result, whose axes are `scale[0] / scale[1]` times as long.
            x (N, C, X, Y, Z): the whole input.
            tile_size: size of a tile in voxels of `x`.
            scale: numerator and denominator of the change in resolution.
        """
        output = total = None
        for source, target, weight in self._tiles(x, tile_size, scale):
            result = function(x[(..., *source)])
            if output is None:
                shape = [size * scale[0] // scale[1] for size in x.shape[2:]]
                output = torch.zeros((*result.shape[:2], *shape), dtype=torch.float32, device=x.device)
                total = torch.zeros(shape, dtype=torch.float32, device=x.device)
            output[(..., *target)] += result * weight
            total[target] += weight
        return (output / total).to(result.dtype)

    def _tiles(
        self, x: torch.Tensor, tile_size: tuple[int, int, int], scale: tuple[int, int]
    ) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], torch.Tensor]]:
        """
        Overlapping tiles: the window of each in `x`, that in the result, and the weights of its voxels there, which
        fall linearly towards each face.

        The last tile of an axis is moved back to end with the volume, so that every tile has the full size: a sliver
        would have group-norm statistics far from the rest.
        """

        def scaled(length: int) -> int:
            return length * scale[0] // scale[1]

        # Starts are multiples of the downsampling, so that every tile meets the same strides as the whole.
        step = scale[1]
        starts = []
        tiles = tuple(min(tile, size) for tile, size in zip(tile_size, x.shape[2:]))
        for tile, size in zip(tiles, x.shape[2:]):
            stride = max(int(tile * (1 - self.tile_overlap)) // step, 1) * step
            starts.append([*range(0, size - tile, stride), size - tile])

        ramps = []
        for tile in tiles:
            position = torch.arange(scaled(tile), dtype=torch.float32, device=x.device)
            ramps.append(torch.minimum(position + 1, scaled(tile) - position))
        weight = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]

        for start in itertools.product(*starts):
            source = tuple(slice(s, s + tile) for s, tile in zip(start, tiles))
            target = tuple(slice(scaled(s), scaled(s + tile)) for s, tile in zip(start, tiles))
            yield source, target, weight

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        r"""
        Args:
            x (N, in_channels, X, Y, Z): image in 0..1 (see [`maisi_diffusers.imaging`] for HU), or label bits; every
                axis divisible by 4 for three levels.
            return_dict: return an [`~diffusers.models.modeling_outputs.AutoencoderKLOutput`] instead of a tuple.

        Returns:
            the posterior of the unscaled latent (N, latent_channels, X/4, Y/4, Z/4) as `latent_dist`.
        """
        ratio = self.spatial_compression_ratio
        if any(size % ratio for size in x.shape[2:]):
            raise ValueError(
                f"the size {tuple(x.shape[2:])} does not divide by {ratio}: pad or resample to multiples of it"
            )
        if self.use_slicing and x.shape[0] > 1:
            moments = torch.cat([self._encode(x_slice) for x_slice in x.split(1)])
        else:
            moments = self._encode(x)
        posterior = DiagonalGaussianDistribution(moments)
        if not return_dict:
            return (posterior,)
        return AutoencoderKLOutput(latent_dist=posterior)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        r"""
        Args:
            z (N, latent_channels, X, Y, Z): the unscaled latent (divide by `config.scaling_factor` first).
            return_dict: return a [`~diffusers.models.autoencoders.vae.DecoderOutput`] instead of a tuple.

        Returns:
            the image (N, out_channels, 4X, 4Y, 4Z) for three levels, as `sample`; not clipped.
        """
        if self.use_slicing and z.shape[0] > 1:
            sample = torch.cat([self._decode(z_slice) for z_slice in z.split(1)])
        else:
            sample = self._decode(z)
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    @apply_forward_hook
    def decode_classes(self, z: torch.Tensor) -> torch.Tensor:
        r"""
        `decode(z).sample.argmax(dim=1, keepdim=True)`, for a mask VAE, in much less memory: one sample after the
        other, and never all outputs of it.

        Args:
            z (N, latent_channels, X, Y, Z): the unscaled latent (divide by `config.scaling_factor` first).

        Returns:
            int16 (N, 1, 4X, 4Y, 4Z) for three levels: the index of the largest output. Tiled, each voxel has it from
            the tile in which it is farthest from the faces.
        """
        return torch.cat([self._decode_classes(z_slice) for z_slice in z.split(1)])

    def _decode_classes(self, z: torch.Tensor) -> torch.Tensor:
        ratio = self.spatial_compression_ratio
        tile_latent_size = tuple(size // ratio for size in self.tile_sample_size)
        if not self.use_tiling or all(size <= tile for size, tile in zip(z.shape[2:], tile_latent_size)):
            return self.decoder(self.post_quant_conv(z), return_classes=True)
        shape = [size * ratio for size in z.shape[2:]]
        classes = torch.zeros((1, 1, *shape), dtype=torch.int16, device=z.device)
        nearest = torch.zeros(shape, device=z.device)
        for source, target, weight in self._tiles(z, tile_latent_size, (ratio, 1)):
            tile_classes = self.decoder(self.post_quant_conv(z[(..., *source)]), return_classes=True)
            is_nearer = weight > nearest[target]
            classes[(..., *target)] = torch.where(is_nearer, tile_classes, classes[(..., *target)])
            nearest[target] = torch.maximum(weight, nearest[target])
        return classes

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        r"""
        Encode and decode.

        Args:
            sample (N, in_channels, X, Y, Z): image or label bits.
            sample_posterior: draw the latent from the posterior instead of taking its mean.
            return_dict: return a [`~diffusers.models.autoencoders.vae.DecoderOutput`] instead of a tuple.
            generator: makes the draw deterministic.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)
