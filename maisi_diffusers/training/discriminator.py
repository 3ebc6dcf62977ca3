"""The discriminator that the VAE is trained against."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from ..models.modeling_maisi import MaisiModelMixin

# As published.
NEGATIVE_SLOPE = 0.2
WEIGHT_STD = 0.02


class MaisiDiscriminatorBlock3D(nn.Module):
    """Convolution, instance norm without weights, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, X, Y, Z) -> (N, out_channels, X/2, Y/2, Z/2), or one voxel less an axis for stride 1."""
        return F.leaky_relu(self.norm(self.conv(hidden_states)), NEGATIVE_SLOPE)


class MaisiPatchDiscriminator(MaisiModelMixin, ConfigMixin):
    r"""
    3D PatchGAN discriminator ([Isola et al., 2017](https://arxiv.org/abs/1611.07004)): tells for every place of an
    image whether what is around it is real or reconstructed. The defaults are those of the published training.

    Args:
        in_channels: channels of the image.
        base_channels: channels of the first convolution; each block after it doubles them.
        num_layers: blocks after the first convolution. It and all blocks but the last halve the grid.
    """

    @register_to_config
    def __init__(self, in_channels: int = 1, base_channels: int = 32, num_layers: int = 3):
        super().__init__()
        self.conv_in = nn.Conv3d(in_channels, base_channels, kernel_size=4, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for i in range(num_layers):
            channels, stride = base_channels * 2**i, 1 if i == num_layers - 1 else 2
            self.blocks.append(MaisiDiscriminatorBlock3D(channels, 2 * channels, stride))
        self.conv_out = nn.Conv3d(base_channels * 2**num_layers, 1, kernel_size=4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=WEIGHT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            sample (N, in_channels, X, Y, Z): patches in 0..1, at least 24 voxels an axis for three layers.

        Returns:
            logits (N, 1, x, y, z), high for real, where `x` is `X // 8 - 2` for three layers.

        Raises:
            ValueError: for patches that are too small to give a logit.
        """
        smallest = 3 * 2**self.config.num_layers
        if min(sample.shape[2:]) < smallest:
            raise ValueError(
                f"patches of {tuple(sample.shape[2:])} voxels are too small for the discriminator: give at least "
                f"{smallest} along each axis, or train without it"
            )
        hidden_states = F.leaky_relu(self.conv_in(sample), NEGATIVE_SLOPE)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(hidden_states)
