"""The blocks that the MAISI VAE is made of, its encoder and its decoder."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .unet_3d_blocks_maisi import MaisiBlock3D

if TYPE_CHECKING:
    from .slab_tiling import SlabTiling

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
            hidden_states = self.interpolate(hidden_states)
        return self.conv(hidden_states)

    def interpolate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) -> (N, C, 2X, 2Y, 2Z), trilinear."""
        return F.interpolate(hidden_states, scale_factor=2.0, mode="trilinear", align_corners=False)


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

    @property
    def blocks(self) -> nn.ModuleList:
        """Its levels in the order they run."""
        return self.down_blocks

    def forward(self, sample: torch.Tensor, tiling: "SlabTiling | None" = None) -> torch.Tensor:
        """(N, in_channels, X, Y, Z) -> (N, latent_channels, X/4, Y/4, Z/4) for three levels, in slabs by a tiling."""
        if tiling is not None:
            return torch.cat([tiling.encode(self, one) for one in sample.split(1)])
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

    @property
    def blocks(self) -> nn.ModuleList:
        """Its levels in the order they run."""
        return self.up_blocks

    def forward(
        self, sample: torch.Tensor, return_classes: bool = False, tiling: "SlabTiling | None" = None
    ) -> torch.Tensor:
        """
        (N, latent_channels, X, Y, Z) -> (N, out_channels, 4X, 4Y, 4Z) for three levels; with `return_classes` the
        index of the largest of these outputs instead, int16 (N, 1, 4X, 4Y, 4Z). In slabs by a tiling.
        """
        if tiling is not None:
            finish = class_of_largest if return_classes else nn.Identity()
            return torch.cat([tiling.decode(self, one, finish) for one in sample.split(1)])
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
            classes.append(class_of_largest(slab))
        return torch.cat(classes, dim=2)


def class_of_largest(outputs: torch.Tensor) -> torch.Tensor:
    """(N, C, X, Y, Z) -> the index of the largest of C outputs, int16 (N, 1, X, Y, Z)."""
    return outputs.argmax(dim=1, keepdim=True).to(torch.int16)
