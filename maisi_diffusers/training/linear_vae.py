"""A VAE that begins as the best linear one: principal components of blocks of voxels, and back."""

import torch
from torch import nn

from ..anatomy import DUMMIES, MASK_VAE_LABELS, label_bits
from ..models import AutoencoderKLMaisi
from .intensity_curve import knots_back, set_curve, set_curve_and_air, window_curve
from .latents import encodes_labels

# Of what group norms get: so small that with their epsilon of about 1 they leave it nearly as it is. Smaller with a
# window, since bends magnify what they do; but weights as small as that suffer from further training.
SIZE_BEFORE_NORM, SIZE_WITH_WINDOW = 0.25, 0.1
LOG_VARIANCE = -12.0
# Intensities at which curves are fitted.
GRID = 2001
# Of a mask VAE: by how much a label's logit falls with the squared distance of the bits from its own.
SHARPNESS = 8.0
UNSEEN = 5.0  # by how much lower those of labels begin that stand for nothing yet


def halve(features: torch.Tensor) -> torch.Tensor:
    """Cubes of 2 x 2 x 2 voxels as channels: (C, X, Y, Z) -> (8 C, X/2, Y/2, Z/2), in the order C, X, Y, Z."""
    c, x, y, z = features.shape
    cubes = features.reshape(c, x // 2, 2, y // 2, 2, z // 2, 2).permute(0, 2, 4, 6, 1, 3, 5)
    return cubes.reshape(8 * c, x // 2, y // 2, z // 2)


def means_and_deviations(volumes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The means (C,) of the channels of volumes, each (C, X, Y, Z) of any dtype, and their standard deviations."""
    voxels = sum(volume[0].numel() for volume in volumes)
    means = sum(volume.double().flatten(1).sum(1) for volume in volumes) / voxels
    squares = sum(volume.double().flatten(1).square().sum(1) for volume in volumes) / voxels
    return means.float(), (squares - means.square()).clamp(min=0).sqrt().float()


def principal_components(
    volumes: list[torch.Tensor], means: torch.Tensor, kept: list[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Principal components of cubes of voxels, level by level: those of cubes of 2 x 2 x 2, of these components' cubes
    again, and so on.

    Args:
        volumes: each (C, X, Y, Z) of any dtype, with axes that can be halved so many times.
        means (C,): what is taken from them first.
        kept: how many of each level are kept; all that there are if more.

    Returns:
        a basis of every level, (components, 8 times those of the level before), largest variance first; the standard
        deviations of the last level's components.
    """

    def components(volume: torch.Tensor) -> torch.Tensor:
        features = volume.double() - means.double().view(-1, 1, 1, 1)
        for basis in bases:
            features = torch.einsum("kc,cxyz->kxyz", basis, halve(features))
        return features

    bases = []
    for number in kept:
        width = 8 * (len(bases[-1]) if bases else len(means))
        moments, cubes = torch.zeros(width, width, dtype=torch.float64), 0
        for volume in volumes:
            features = halve(components(volume)).flatten(1)
            moments += features @ features.T
            cubes += features.shape[1]
        squares, vectors = torch.linalg.eigh(moments / cubes)
        bases.append(vectors.flip(1)[:, :number].T)
    deviations = squares.flip(0)[:number].clamp(min=0).sqrt()
    return [basis.float() for basis in bases], deviations.float()


@torch.no_grad()
def make_linear(
    vae: AutoencoderKLMaisi,
    volumes: list[torch.Tensor],
    whitening: float,
    window: tuple[float, float] | None = None,
    window_gain: float = 4.0,
    air: float | None = None,
) -> None:
    """
    Give a VAE the weights by which its latents are the principal components of the blocks that they stand for, and its
    images what these say. The residual blocks do nothing at first, as far as they do not change the channels.

    A mask VAE says by the bits of its label maps: every label's logit is the larger the nearer its bits are to them.
    In an image VAE the intensities of a window can get more room than others: it is linear then in what a curve makes
    of the intensities, in the first residual block of the encoder, and the last of the decoder turns them back.

    Args:
        vae: of images or of label maps, with transposed convolutions, group norms with an epsilon near 1 and an even
            number of channels in a group, and enough channels: in the first level twice those that it takes, in the
            level before the last those of the latent, and twice as many in the last.
        volumes: to learn the components from, each (1, X, Y, Z) in 0..1, or the bits (8, X, Y, Z) of a label map.
        whitening: 0 leaves the components their variances, 1 gives all of them the same.
        window: lowest and highest of the intensities, of 0..1, that get more room; None for none that do.
        window_gain: times as much.
        air: of an image VAE with a window, the intensity, below that, from which on images are cleaned of noise by
            their neighbours (see [`set_curve_and_air`]); None for not at all.

    Raises:
        ValueError: for a VAE that cannot do it.
    """
    config = vae.config
    number, channels, inputs = config.latent_channels, config.block_out_channels, config.in_channels
    wanted = [2 * inputs, *[1] * (len(channels) - 2), 2 * number]
    wanted[-2] = max(wanted[-2], number)
    if not config.use_conv_transpose or any(has < n for has, n in zip(channels, wanted)):
        raise ValueError(
            f"a VAE of block_out_channels={tuple(channels)}, in_channels={inputs}, latent_channels={number} and "
            f"use_conv_transpose={config.use_conv_transpose} cannot be linear: it takes transposed convolutions and "
            f"at least {tuple(wanted)} channels"
        )
    last_encoder, last_decoder = (blocks[-1].resnets[0] for blocks in (vae.encoder.blocks, vae.decoder.blocks))
    if last_encoder.conv_shortcut is None or last_decoder.conv_shortcut is None:
        raise ValueError(f"block_out_channels={tuple(channels)}: the first and the last two must differ")
    if window is not None and (inputs != 1 or not 0 <= window[0] < window[1] <= 1 or window_gain <= 0):
        raise ValueError(
            f"window={window}, window_gain={window_gain} for a VAE of in_channels={inputs}: a window is of images, "
            "from low to high in 0..1, and its gain above 0"
        )

    if air is not None and (window is None or not 0 < air < window[0]):
        raise ValueError(f"air={air} with window={window}: it goes with a window, and is below it and above 0")

    for block in (*vae.encoder.blocks, *vae.decoder.blocks):
        for resnet in block.resnets:
            clear(resnet.conv2)
            if resnet.conv_shortcut is not None:
                copy_channels(resnet.conv_shortcut)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        copy_channels(conv)
    means, spreads = means_and_deviations(volumes)
    vae.encoder.conv_in.bias[:inputs] = -means
    middle, size = means, SIZE_BEFORE_NORM if window is None else SIZE_WITH_WINDOW
    if window is not None:
        grid = torch.linspace(0, 1, GRID, dtype=torch.float64) - float(means)
        low, high = (edge - float(means) for edge in window)
        there = window_curve(low, high, window_gain, grid, num_knots=channels[0] // 2)
        volumes = [there(volume - means).float() for volume in volumes]
        middle, widths = means_and_deviations(volumes)
        there = there.lowered(float(middle))
        vae.encoder.conv_in.weight[1], vae.encoder.conv_in.bias[1] = -vae.encoder.conv_in.weight[0], means[0]
        set_curve(vae.encoder.blocks[0].resnets[0], there, float(spreads) ** 2, size, torch.ones(1))
    bases, deviations = principal_components(volumes, middle, [*channels[:-2], number])

    # The voxels of a cube become components, level by level, and back.
    downsamplers = [block.resampler.conv for block in vae.encoder.blocks[:-1]]
    upsamplers = [block.resampler.conv for block in vae.decoder.blocks[:-1]][::-1]
    for basis, down, up in zip(bases, downsamplers, upsamplers):
        clear(down)
        clear(up)
        kernels = basis.unflatten(1, (-1, 2, 2, 2))
        down.weight[: len(kernels), : kernels.shape[1], :2, :2, :2] = kernels
        up.weight[: len(kernels), : kernels.shape[1], 1:, 1:, 1:] = kernels

    encoder_end = last_encoder.conv_shortcut, vae.encoder.conv_norm_out, vae.encoder.conv_out
    through_norm(*encoder_end, deviations, torch.eye(number), size)
    says, constants = torch.eye(inputs), means
    if encodes_labels(vae):
        bits = label_bits(torch.tensor(MASK_VAE_LABELS).view(1, 1, -1, 1, 1))[0].flatten(1).T
        says = 2 * SHARPNESS * bits
        constants = says @ means - SHARPNESS * bits.square().sum(1)
        constants[[MASK_VAE_LABELS.index(i) for i in DUMMIES if i in MASK_VAE_LABELS]] -= UNSEEN
    decoder_end = last_decoder.conv_shortcut, vae.decoder.conv_norm_out, vae.decoder.conv_out
    through_norm(*decoder_end, spreads, says, size)
    vae.decoder.conv_out.bias += constants
    if window is not None:
        upsamplers[0].weight[:, 1] = -upsamplers[0].weight[:, 0]
        outputs = last_decoder.conv_shortcut.weight[:2, 0, 0, 0, 0]
        back = there.inverse(grid, knots_back(low, high, channels[0] // 2 - (air is not None)))
        if air is None:
            set_curve(last_decoder, back, float(widths) ** 2, size, outputs)
        else:
            air = float(there(torch.tensor(air - float(means))))
            set_curve_and_air(last_decoder, back, air, float(widths) ** 2, size, outputs)

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


def through_norm(
    before: nn.Conv3d,
    norm: nn.GroupNorm,
    behind: nn.Conv3d,
    deviations: torch.Tensor,
    says: torch.Tensor,
    largest: float,
) -> None:
    """
    Bring channels through a group norm unchanged, but for what their variance is off what is expected.

    Each goes as two, one of them negative, so that the norm finds no mean; and small beside its epsilon.

    Args:
        before: convolution of kernel 1, whose first input channels are wanted.
        norm: the norm.
        behind: convolution whose first output channels are to be these, times `says`.
        deviations: their standard deviations.
        says: a matrix (outputs, channels).
        largest: deviation that a channel gets before the norm.
    """
    number, of_group = len(deviations), norm.num_channels // norm.num_groups
    size = largest / deviations.max()
    squares = torch.zeros(norm.num_channels)
    squares[: 2 * number] = (size * deviations).square().repeat_interleave(2)
    gain = (squares.view(-1, of_group).mean(1) + norm.eps).sqrt().repeat_interleave(of_group)
    clear(before)
    clear(behind)
    centre = behind.kernel_size[0] // 2
    for i in range(number):
        for channel, sign in ((2 * i, 1), (2 * i + 1, -1)):
            before.weight[channel, i, 0, 0, 0] = sign * size
            behind.weight[: len(says), channel, centre, centre, centre] = (
                sign * gain[channel] / (2 * size) * says[:, i]
            )
