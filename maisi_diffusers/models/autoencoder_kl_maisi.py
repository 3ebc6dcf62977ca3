"""The variational autoencoder of MAISI, for images and for label maps."""

import os
from typing import Literal

import torch
from accelerate.utils import convert_file_size_to_int
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import distributed as dist
from torch import nn

from .modeling_maisi import MaisiModelMixin
from .slab_tiling import SlabTiling
from .tiling_choice import choose_tiling, needs_its_layers_called
from .unet_3d_blocks_maisi import expand_to_levels
from .vae_blocks_maisi import MaisiDecoder3D, MaisiEncoder3D


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
        self.tiling: SlabTiling | Literal["auto"] | None = "auto"

    def enable_auto_tiling(self) -> None:
        r"""
        Let every call choose by the memory that is there, as at first: in one piece if that fits, else as after
        [`enable_exact_tiling`], or as after [`enable_tiling`] with a warning if the disk is too full for that. On the
        CPU slabs are also faster than one piece and more precise, so there it is never one piece. Where gradients are
        wanted, layers are offloaded, or the model is compiled, it is always.
        """
        self.tiling = "auto"

    def enable_tiling(self, memory: int | str | None = None, folder: str | os.PathLike | None = None) -> None:
        r"""
        Encode and decode in slabs along X with the result of the whole, like [`enable_exact_tiling`], but keep only a
        quarter of the features: those of the finest level are made anew for each of its norms and for the result. This
        takes several times as long. For inference.

        Args:
            memory: what features may take at once, in bytes or as `"4GiB"`; what is free at each call if not given. At
                least some planes of the volume are in memory, however little that is.
            folder: where a scratch file is made when what is kept from layer to layer does not fit into the memory (of
                a GPU, nor that of the host); the system's for temporary files if not given, or `/var/tmp` where that
                is in memory itself.
        """
        self._enable_tiling(memory, folder, keeps_finest=False)

    def enable_exact_tiling(
        self,
        memory: int | str | None = None,
        folder: str | os.PathLike | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        r"""
        Encode and decode in slabs along X with the result of the whole, but for rounding: group norms have the
        statistics of the whole volume, for which two and a half volumes of features of the finest level are kept. For
        inference.

        Args:
            memory, folder: see [`enable_tiling`]; of each process.
            group: processes, each with this model, that share the slabs. They are called with the same, and all get
                the result. No more of them than the latent has voxels along X.
        """
        self._enable_tiling(memory, folder, keeps_finest=True, group=group)

    def _enable_tiling(
        self,
        memory: int | str | None,
        folder: str | os.PathLike | None,
        keeps_finest: bool,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        size = None if memory is None else convert_file_size_to_int(memory)
        if size is not None and size <= 0:
            raise ValueError(f'memory={memory!r} is not allowed: give a positive number of bytes, or e.g. "4GiB"')
        if folder is not None and not os.path.isdir(folder):
            raise FileNotFoundError(f"there is no folder {str(folder)!r} for a scratch file: make it or leave it out")
        self.tiling = SlabTiling(size, keeps_finest, folder, group)

    def disable_tiling(self) -> None:
        """Encode and decode in one piece."""
        self.tiling = None

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        tiling = self._tiling_of(self.encoder, x)
        return self.quant_conv(self.encoder(x, tiling=tiling))

    def _decode(self, z: torch.Tensor, return_classes: bool = False) -> torch.Tensor:
        tiling = self._tiling_of(self.decoder, z)
        return self.decoder(self.post_quant_conv(z), return_classes=return_classes, tiling=tiling)

    def _tiling_of(self, network: MaisiEncoder3D | MaisiDecoder3D, x: torch.Tensor) -> SlabTiling | None:
        if self.tiling != "auto":
            if self.tiling is not None and needs_its_layers_called(network, x.device):
                raise ValueError(
                    "slabs do not work with a VAE whose layers are offloaded or cast one by one: call "
                    "vae.enable_auto_tiling(), or offload whole models (pipe.enable_model_cpu_offload())"
                )
            if self.tiling is not None and torch.is_grad_enabled() and x.requires_grad:
                raise ValueError(
                    "slabs have no gradients, and the input wants one: call vae.enable_auto_tiling(), or decode and "
                    "encode under torch.no_grad()"
                )
            return self.tiling
        is_compiled = network._compiled_call_impl is not None or hasattr(network, "_orig_mod")
        is_compiled |= torch.compiler.is_compiling()
        if torch.is_grad_enabled() or is_compiled:
            return None
        return choose_tiling(network, x)

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
            int16 (N, 1, 4X, 4Y, 4Z) for three levels: the index of the largest output.
        """
        return torch.cat([self._decode(one, return_classes=True) for one in z.split(1)])

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


TILINGS = {
    "auto": AutoencoderKLMaisi.enable_auto_tiling,
    "off": AutoencoderKLMaisi.disable_tiling,
    "exact": AutoencoderKLMaisi.enable_exact_tiling,
    "lean": AutoencoderKLMaisi.enable_tiling,
}
"""Names of the ways to run a VAE in slabs -> the method that enables each."""
