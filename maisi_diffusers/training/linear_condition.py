"""A ControlNet that begins as the best linear one: it sees the latents that its labels' mean intensities stand for."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..anatomy import label_bits
from ..models import MaisiControlNetModel
from .linear_vae import halve

NUM_LABELS = 256
# Of the small network from bits to intensities: chances, steps, rate.
RESTARTS, FIT_STEPS, FIT_RATE = 16, 4000, 0.03


@dataclass
class LabelledLatent:
    """
    A case to learn from.

    Args:
        image (1, X, Y, Z): what the VAE makes of the latent, about 0..1.
        labels (1, X, Y, Z) uint8: its label map.
        latent (C, x, y, z): scaled.
    """

    image: torch.Tensor
    labels: torch.Tensor
    latent: torch.Tensor


def mean_intensities(cases: list[LabelledLatent]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean intensity (256,) of every label, and which labels there are, bool (256,)."""
    counts, sums = torch.zeros(2, NUM_LABELS, dtype=torch.float64)
    for case in cases:
        labels = case.labels.flatten().long()
        counts += torch.bincount(labels, minlength=NUM_LABELS)
        sums += torch.bincount(labels, weights=case.image.flatten().double(), minlength=NUM_LABELS)
    return (sums / counts.clamp(min=1)).float(), counts > 0


def cubes_to_latents(
    cases: list[LabelledLatent], intensities: torch.Tensor, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Least squares from the intensities (256,) of cubes of labels to latents.

    Returns:
        factors (C, ratio^3), voxels in the order of [`cubes_of`], and constants (C,).
    """
    squares, products = 0, 0
    for case in cases:
        values = intensities[cubes_of(case.labels, ratio).long()].double()
        values = torch.cat([values, torch.ones(len(values), 1, dtype=torch.float64)], dim=1)
        squares = squares + values.T @ values
        products = products + values.T @ case.latent.flatten(1).T.double()
    # Voxels of a cube are much alike: a little of the mean variance keeps their factors small.
    squares.diagonal()[:-1] += 1e-4 * squares.diagonal()[:-1].mean()
    solution = torch.linalg.solve(squares, products).T.float()
    return solution[:, :-1], solution[:, -1]


def cubes_of(volume: torch.Tensor, edge: int) -> torch.Tensor:
    """A volume (1, X, Y, Z) as cubes (N, edge^3), their voxels in the order in which [`halve`] nests them."""
    for _ in range(edge.bit_length() - 1):
        volume = halve(volume)
    return volume.flatten(1).T


@torch.no_grad()
def make_linear_condition(controlnet: MaisiControlNetModel, cases: list[LabelledLatent], seed: int = 0) -> float:
    """
    Give a ControlNet the embedding of label maps that adds to its first features the latents which the labels' mean
    intensities stand for, along those directions that the noisy latents use least.

    Two convolutions turn the bits of a voxel's label into its intensity, fitted by gradient descent; from there on all
    is linear, every value going as x and -x through SiLU, of which silu(x) - silu(-x) = x.

    Args:
        controlnet: a new one, with an embedding of 8 channels, then 2 * 8, 2 * 64, ... and at last twice those of the
            latents, or more.
        cases: what intensities and latents go with which labels.
        seed: of the fit.

    Returns:
        the root mean square, over labels, by which the fit misses their intensities.

    Raises:
        ValueError: for a ControlNet that cannot do it.
    """
    embedding, channels = controlnet.controlnet_cond_embedding, controlnet.config.conditioning_embedding_out_channels
    features, number, ratio = controlnet.conv_in.out_channels, controlnet.config.in_channels, 2 ** (len(channels) - 1)
    wanted = [8, *(2 * 8**i for i in range(1, len(channels) - 1)), 2 * number]
    if any(has < n for has, n in zip(channels, wanted)) or features < number:
        raise ValueError(
            f"conditioning_embedding_out_channels={tuple(channels)} and block_out_channels[0]={features} cannot carry "
            f"{number} latents from the start: it takes at least {tuple(wanted)} and {number}"
        )
    error, layers = fit_bits(*mean_intensities(cases), seed)
    factors, constants = cubes_to_latents(cases, intensities_of(layers), ratio)

    (weight_1, bias_1), (weight_2, bias_2), (weight_3, bias_3) = layers
    set_centre(embedding.conv_in, weight_1, bias_1)
    set_centre(embedding.blocks[0], weight_2, bias_2)
    # Level by level the voxels of a cube become channels, each of them twice.
    halvings = embedding.blocks[1::2]
    for i, conv in enumerate(halvings):
        is_last = i + 1 == len(halvings)
        basis = factors if is_last else torch.eye(8 ** (i + 1))
        kernels = basis.unflatten(1, (-1, 2, 2, 2))
        weight, bias = torch.zeros(len(basis), *conv.weight.shape[1:]), torch.zeros(len(basis))
        if i == 0:  # from what the fitted layers leave
            weight[:, : weight_3.shape[1], 1:, 1:, 1:] = kernels * weight_3.view(1, -1, 1, 1, 1)
            bias = basis.sum(1) * bias_3
        else:
            weight[:, : 2 * kernels.shape[1] : 2, 1:, 1:, 1:] = kernels
            weight[:, 1 : 2 * kernels.shape[1] : 2, 1:, 1:, 1:] = -kernels
        set_twice(conv, weight, bias + constants if is_last else bias)
        if not is_last:
            unchanged = embedding.blocks[2 * i + 2]
            weight = torch.zeros(len(basis), *unchanged.weight.shape[1:])
            for channel in range(len(basis)):
                weight[channel, 2 * channel, 1, 1, 1], weight[channel, 2 * channel + 1, 1, 1, 1] = 1, -1
            set_twice(unchanged, weight, torch.zeros(len(basis)))

    directions, strengths, _ = torch.linalg.svd(controlnet.conv_in.weight.float().flatten(1))
    size = strengths.square().mean().sqrt()
    conv = embedding.conv_out
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    for channel in range(number):
        direction = size * directions[:, -1 - channel]
        conv.weight[:, 2 * channel, 1, 1, 1], conv.weight[:, 2 * channel + 1, 1, 1, 1] = direction, -direction
    return error


def set_centre(conv: nn.Conv3d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """A convolution that looks at one voxel: weights (out, in) and bias of its first channels, the others nothing."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight[: len(weight), : weight.shape[1], 1, 1, 1] = weight
    conv.bias[: len(bias)] = bias


def set_twice(conv: nn.Conv3d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Channel by channel weights and bias, and after each its negative; channels that are left stay as they are."""
    number = 2 * len(weight)
    conv.weight[:number] = torch.stack([weight, -weight], dim=1).flatten(0, 1)
    conv.bias[:number] = torch.stack([bias, -bias], dim=1).flatten()


Layers = list[tuple[torch.Tensor, torch.Tensor]]


def bits_of_labels() -> torch.Tensor:
    """Bits (256, 8) of the labels 0 to 255."""
    return label_bits(torch.arange(NUM_LABELS).view(1, 1, -1, 1, 1))[0].flatten(1).T


def intensities_of(layers: Layers) -> torch.Tensor:
    """What layers (weight, bias) with SiLU between them make of the bits of the labels 0 to 255: (256,)."""
    values = bits_of_labels()
    for i, (weight, bias) in enumerate(layers):
        values = F.linear(values if i == 0 else F.silu(values), weight, bias)
    return values[:, 0]


@torch.enable_grad()
def fit_bits(intensities: torch.Tensor, present: torch.Tensor, seed: int) -> tuple[float, Layers]:
    """
    Layers of 8, 8 and 1 channels that make intensities (256,) of the bits of the labels that are present, the best of
    several; and by how much they miss them.
    """
    generator = torch.Generator().manual_seed(seed)
    bits = bits_of_labels()[present].expand(RESTARTS, -1, -1)
    mean, deviation = intensities[present].mean(), intensities[present].std().clamp(min=1e-6)
    target = ((intensities[present] - mean) / deviation).expand(RESTARTS, -1)
    weights = [torch.randn(RESTARTS, n, 8, generator=generator).requires_grad_() for n in (8, 8, 1)]
    biases = [torch.randn(RESTARTS, n, generator=generator).requires_grad_() for n in (8, 8, 1)]
    optimizer = torch.optim.Adam([*weights, *biases], lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FIT_RATE, total_steps=FIT_STEPS)
    for _ in range(FIT_STEPS):
        values = bits
        for i, (weight, bias) in enumerate(zip(weights, biases)):
            values = (values if i == 0 else F.silu(values)) @ weight.mT + bias[:, None]
        losses = (values[..., 0] - target).square().mean(1)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
    best = losses.argmin()
    layers = [(weight[best].detach(), bias[best].detach()) for weight, bias in zip(weights, biases)]
    layers[2] = (layers[2][0] * deviation, layers[2][1] * deviation + mean)
    return float(losses[best].detach().sqrt() * deviation), layers
