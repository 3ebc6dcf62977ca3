"""A VAE that begins as the best linear one: principal components of blocks of voxels, and back."""

from collections.abc import Iterable
from itertools import product

import torch
from torch import nn

from ..models import AutoencoderKLMaisi

# Of what group norms get: so small that with their epsilon of about 1 they leave it nearly as it is.
SIZE_BEFORE_NORM = 0.25
LOG_VARIANCE = -12.0


def components_of_blocks(volumes: Iterable[torch.Tensor], edge: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """
    Principal components of cubes of voxels.

    Args:
        volumes: each (1, X, Y, Z), with axes that divide by `edge`.
        edge: voxels along an edge of a cube.

    Returns:
        the mean of all voxels; the components (edge^3, edge^3), a row each, largest variance first, of the cubes less
        that mean, in the order X, Y, Z of their voxels; their standard deviations.
    """
    number, sums = 0, torch.zeros(edge**3, dtype=torch.float64)
    products = torch.zeros(edge**3, edge**3, dtype=torch.float64)
    for volume in volumes:
        blocks = volume[0].unfold(0, edge, edge).unfold(1, edge, edge).unfold(2, edge, edge)
        blocks = blocks.reshape(-1, edge**3).double()
        number += len(blocks)
        products += blocks.T @ blocks
        sums += blocks.sum(0)
    mean = float(sums.mean()) / number
    moments = products / number - mean * (sums[:, None] + sums[None, :]) / number + mean**2
    variances, components = torch.linalg.eigh(moments)
    return mean, components.flip(1).T, variances.flip(0).clamp(min=0).sqrt()


@torch.no_grad()
def make_linear(vae: AutoencoderKLMaisi, volumes: Iterable[torch.Tensor], whitening: float) -> None:
    """
    Give a VAE the weights by which its latents are the principal components of the blocks that they stand for, and its
    images what these say. The residual blocks do nothing at first, as far as they do not change the channels.

    Args:
        vae: of images, with transposed convolutions, group norms with an epsilon near 1 and an even number of channels
            in a group, and enough channels: 8 in the first level, those of the latent in the level before the last,
            and twice as many in the last.
        volumes: to learn the components from, each (1, X, Y, Z) in 0..1.
        whitening: 0 leaves the components their variances, 1 gives all of them the same.

    Raises:
        ValueError: for a VAE that cannot do it.
    """
    config, ratio = vae.config, vae.spatial_compression_ratio
    number, channels = config.latent_channels, config.block_out_channels
    wanted = [min(8 ** (i + 1), number) for i in range(len(channels) - 1)] + [2 * number]
    if not config.use_conv_transpose or config.in_channels != 1 or any(has < n for has, n in zip(channels, wanted)):
        raise ValueError(
            f"a VAE of block_out_channels={tuple(channels)}, latent_channels={number} and use_conv_transpose="
            f"{config.use_conv_transpose} cannot be linear: it takes images, transposed convolutions and at least "
            f"{tuple(wanted)} channels"
        )
    last_encoder, last_decoder = (blocks[-1].resnets[0] for blocks in (vae.encoder.blocks, vae.decoder.blocks))
    if last_encoder.conv_shortcut is None or last_decoder.conv_shortcut is None:
        raise ValueError(f"block_out_channels={tuple(channels)}: the first and the last two must differ")
    mean, components, deviations = components_of_blocks(volumes, ratio)
    of_image = deviations.square().mean().sqrt().float()
    components, deviations = components[:number].float(), deviations[:number].float()

    for block in (*vae.encoder.blocks, *vae.decoder.blocks):
        for resnet in block.resnets:
            clear(resnet.conv2)
            if resnet.conv_shortcut is not None:
                copy_channels(resnet.conv_shortcut)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        copy_channels(conv)
    vae.encoder.conv_in.bias[0] = -mean

    # The voxels of a cube become channels, level by level, and at the last one these become components; and back.
    downsamplers = [block.resampler.conv for block in vae.encoder.blocks[:-1]]
    upsamplers = [block.resampler.conv for block in vae.decoder.blocks[:-1]][::-1]
    for i, (down, up) in enumerate(zip(downsamplers, upsamplers)):
        clear(down)
        clear(up)
        basis = components if i + 1 == len(downsamplers) else torch.eye(8 ** (i + 1))
        for inner, outer in product(product(range(2**i), repeat=3), product((0, 1), repeat=3)):
            x, y, z = (2**i * far + near for far, near in zip(outer, inner))
            column = basis[:, (x * 2 ** (i + 1) + y) * 2 ** (i + 1) + z]
            channel = (inner[0] * 2**i + inner[1]) * 2**i + inner[2]
            down.weight[: len(basis), channel, outer[0], outer[1], outer[2]] = column
            up.weight[: len(basis), channel, 1 + outer[0], 1 + outer[1], 1 + outer[2]] = column

    through_norm(last_encoder.conv_shortcut, vae.encoder.conv_norm_out, vae.encoder.conv_out, deviations)
    through_norm(last_decoder.conv_shortcut, vae.decoder.conv_norm_out, vae.decoder.conv_out, of_image[None])
    vae.decoder.conv_out.bias += mean

    scales = deviations.clamp(min=1e-6) ** -whitening
    for conv, factors in ((vae.quant_conv, scales), (vae.post_quant_conv, 1 / scales)):
        copy_channels(conv)
        conv.weight[range(number), range(number), 0, 0, 0] = factors
    vae.quant_conv.bias[number:] = LOG_VARIANCE


def clear(conv: nn.Module) -> None:
    """Nothing comes out of it."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


def copy_channels(conv: nn.Conv3d) -> None:
    """What comes out of it is what goes in, as far as there are channels."""
    clear(conv)
    centre = conv.kernel_size[0] // 2
    for i in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[i, i, centre, centre, centre] = 1


def through_norm(before: nn.Conv3d, norm: nn.GroupNorm, behind: nn.Conv3d, deviations: torch.Tensor) -> None:
    """
    Bring channels through a group norm unchanged, but for what their variance is off what is expected.

    Each goes as two, one of them negative, so that the norm finds no mean; and small beside its epsilon.

    Args:
        before: convolution of kernel 1, whose first input channels are wanted.
        norm: the norm.
        behind: convolution whose first output channels they become.
        deviations: their standard deviations.
    """
    number, of_group = len(deviations), norm.num_channels // norm.num_groups
    size = SIZE_BEFORE_NORM / deviations.max()
    squares = torch.zeros(norm.num_channels)
    squares[: 2 * number] = (size * deviations).square().repeat_interleave(2)
    gain = (squares.view(-1, of_group).mean(1) + norm.eps).sqrt().repeat_interleave(of_group)
    clear(before)
    clear(behind)
    centre = behind.kernel_size[0] // 2
    for i in range(number):
        for channel, sign in ((2 * i, 1), (2 * i + 1, -1)):
            before.weight[channel, i, 0, 0, 0] = sign * size
            behind.weight[i, channel, centre, centre, centre] = sign * gain[channel] / (2 * size)
