"""The variational autoencoder of MAISI, for images and for label maps."""

import itertools
import os
from collections.abc import Callable, Iterator
from numbers import Real

import torch
from accelerate.utils import convert_file_size_to_int
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .exact_tiling import ExactTiling
from .modeling_maisi import MaisiModelMixin
from .unet_3d_blocks_maisi import expand_to_levels
from .vae_blocks_maisi import MaisiDecoder3D, MaisiEncoder3D, class_of_largest


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
        self.exact_tiling = None
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
        self.exact_tiling = None

    def enable_exact_tiling(self, memory: int | str = "4GiB", folder: str | os.PathLike | None = None) -> None:
        r"""
        Encode and decode in slabs along X with the result of the whole, but for rounding: convolutions see their true
        neighbours, and group norms the statistics of the whole volume. For inference; gradients need the whole.

        Args:
            memory: what features may take at once, in bytes or as `"4GiB"`. At least some planes of the volume are
                in memory, however little that is.
            folder: where a scratch file is made when what is kept from layer to layer does not fit into the memory;
                the system's for temporary files if not given. It takes up to twice the features of the finest level.
        """
        size = convert_file_size_to_int(memory)
        if size <= 0:
            raise ValueError(f'memory={memory!r} is not allowed: give a positive number of bytes, or e.g. "4GiB"')
        if folder is not None and not os.path.isdir(folder):
            raise FileNotFoundError(f"there is no folder {str(folder)!r} for a scratch file: make it or leave it out")
        self.exact_tiling = ExactTiling(size, folder)
        self.use_tiling = False

    def disable_tiling(self) -> None:
        """Encode and decode in one piece."""
        super().disable_tiling()
        self.exact_tiling = None

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.exact_tiling is not None:
            return self.quant_conv(torch.cat([self.exact_tiling.run(self.encoder, one) for one in x.split(1)]))
        if self.use_tiling and any(size > tile for size, tile in zip(x.shape[2:], self.tile_sample_size)):
            return self._tiled(self._encode_tile, x, self.tile_sample_size, (1, self.spatial_compression_ratio))
        return self._encode_tile(x)

    def _encode_tile(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x))

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        if self.exact_tiling is not None:
            z = self.post_quant_conv(z)
            return torch.cat([self.exact_tiling.run(self.decoder, one) for one in z.split(1)])
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
        if self.exact_tiling is not None:
            return self.exact_tiling.run(self.decoder, self.post_quant_conv(z), finish=class_of_largest)
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
