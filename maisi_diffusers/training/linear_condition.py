"""A ControlNet that begins as the best linear one: it sees the latents that its labels' values stand for."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..anatomy import label_bits
from ..models import MaisiControlNetModel
from .linear_vae import halve

NUM_LABELS = 256
# How much the square of what is not known counts beside that of an error, of the mean label's.
RIDGE = 1e-6
# Of the small network from bits to values: chances, steps, rate. With 16 channels these steps meet the values of all
# labels of phantoms. With a fifth of the steps labels of few voxels are missed, tumors by more than they differ from
# their organs, and while the embedding is frozen no training makes up for that: of labels nothing but values is seen.
RESTARTS, FIT_STEPS, FIT_RATE = 16, 20_000, 0.03


@dataclass
class LabelledLatent:
    """
    A case to learn from.

    Args:
        labels (1, X, Y, Z) uint8: its label map.
        latent (C, x, y, z): scaled.
        modality: its code.
    """

    labels: torch.Tensor
    latent: torch.Tensor
    modality: int


def label_values(cases: list[LabelledLatent], ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Numbers for every label, of which latents are made: what the labels' shares in a cube of ratio^3 voxels say of its
    latent, in least squares, along the direction in which that differs most; in the latents of a CT it is brightness.
    And, of cases of several modalities, how much that differs between these, as contrast agent does.

    Returns:
        the values (256, 1 or 2), and how many voxels the labels have (256,).
    """
    mean = torch.stack([case.latent.flatten(1).mean(1) for case in cases]).mean(0)
    squares, products = defaultdict(int), defaultdict(int)
    for case in cases:
        cubes = cubes_of(case.labels, ratio).long()
        shares = torch.zeros(len(cubes), NUM_LABELS).scatter_add_(1, cubes, torch.full(cubes.shape, 1 / ratio**3))
        squares[case.modality] += (shares.T @ shares).double()
        products[case.modality] += (shares.T @ (case.latent.flatten(1).T - mean)).double()
    all_squares = sum(squares.values())
    ridge = RIDGE * all_squares.diagonal().mean() * torch.eye(NUM_LABELS)
    latents = torch.linalg.solve(all_squares + ridge, sum(products.values()))
    direction = torch.linalg.eigh(latents.T @ all_squares @ latents).eigenvectors[:, -1:]
    values = latents @ direction
    counts = ratio**3 * torch.stack([one.sum(1) for one in squares.values()], dim=1)
    if len(squares) > 1:
        # Of labels that one modality hardly has, it says little.
        off = [
            torch.linalg.solve(one + 100 * ridge, products[modality] @ direction - one @ values)
            for modality, one in squares.items()
        ]
        off = torch.cat(off, dim=1)
        pattern = torch.linalg.svd(counts.sum(1, keepdim=True).sqrt() * off).Vh[0]
        values = torch.cat([values, off @ pattern[:, None]], dim=1)
    return values.float(), counts.sum(1).float()


def cubes_to_latents(
    cases: list[LabelledLatent], values: torch.Tensor, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Least squares from the values (256,) of cubes of labels to latents.

    Returns:
        factors (C, ratio^3), voxels in the order of [`cubes_of`], and constants (C,).
    """
    squares, products = 0, 0
    for case in cases:
        cubes = values[cubes_of(case.labels, ratio).long()].double()
        cubes = torch.cat([cubes, torch.ones(len(cubes), 1, dtype=torch.float64)], dim=1)
        squares = squares + cubes.T @ cubes
        products = products + cubes.T @ case.latent.flatten(1).T.double()
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
def make_linear_condition(
    controlnet: MaisiControlNetModel, cases: list[LabelledLatent], seed: int = 0
) -> tuple[list[float], list[float]]:
    """
    Give a ControlNet the embedding of label maps that adds to its first features the latents which the labels' values
    stand for, and how these differ between modalities, along those directions that the noisy latents use least.

    Two convolutions turn the bits of a voxel's label into its values, fitted by gradient descent; from there on all is
    linear, every value going as x and -x through SiLU, of which silu(x) - silu(-x) = x.

    Args:
        controlnet: a new one, with an embedding of 8 channels, then 2 * 8, 2 * 64, ... and at last twice those of the
            latents, or more; 2 more everywhere for cases of several modalities, and more than 8 are better.
        cases: what latents go with which labels.
        seed: of the fit.

    Returns:
        of each value by how much the fit misses it at most, of the labels that there are, and its standard deviation
        over voxels.

    Raises:
        ValueError: for a ControlNet that cannot do it.
    """
    embedding, channels = controlnet.controlnet_cond_embedding, controlnet.config.conditioning_embedding_out_channels
    features, number, ratio = controlnet.conv_in.out_channels, controlnet.config.in_channels, 2 ** (len(channels) - 1)
    others = int(len({case.modality for case in cases}) > 1)
    wanted = [8, *(2 * (8**i + others) for i in range(1, len(channels) - 1)), 2 * (number + others)]
    if any(has < n for has, n in zip(channels, wanted)) or features < number + others:
        raise ValueError(
            f"conditioning_embedding_out_channels={tuple(channels)} and block_out_channels[0]={features} cannot carry "
            f"{number} latents from the start: it takes at least {tuple(wanted)} and {number + others}"
        )
    values, counts = label_values(cases, ratio)
    layers = fit_bits(values, counts, channels[0], seed)
    missed = (values_of(layers) - values)[counts > 0].abs().amax(0)
    factors, constants = cubes_to_latents(cases, values_of(layers)[:, 0], ratio)

    (weight_1, bias_1), (weight_2, bias_2), (weight_3, bias_3) = layers
    set_centre(embedding.conv_in, weight_1, bias_1)
    set_centre(embedding.blocks[0], weight_2, bias_2)
    # Level by level the voxels of a cube become channels, each of them twice; of the difference their mean does.
    halvings = embedding.blocks[1::2]
    for i, conv in enumerate(halvings):
        is_last = i + 1 == len(halvings)
        basis = torch.block_diag(
            factors if is_last else torch.eye(8 ** (i + 1)), *[torch.full((1, 8), 1 / 8)] * others
        )
        kernels = basis.unflatten(1, (-1, 2, 2, 2))
        weight, bias = torch.zeros(len(basis), *conv.weight.shape[1:]), torch.zeros(len(basis))
        if i == 0:  # from what the fitted layers leave
            weight[:, : weight_3.shape[1], 1:, 1:, 1:] = torch.einsum("rvxyz,vc->rcxyz", kernels, weight_3)
            bias = kernels.sum((2, 3, 4)) @ bias_3
        else:
            weight[:, : 2 * kernels.shape[1] : 2, 1:, 1:, 1:] = kernels
            weight[:, 1 : 2 * kernels.shape[1] : 2, 1:, 1:, 1:] = -kernels
        if is_last:
            bias[:number] += constants
        set_twice(conv, weight, bias)
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
    for channel in range(number + others):
        direction = size * directions[:, -1 - channel]
        conv.weight[:, 2 * channel, 1, 1, 1], conv.weight[:, 2 * channel + 1, 1, 1, 1] = direction, -direction
    return missed.tolist(), deviations_of(values, counts).tolist()


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


def values_of(layers: Layers) -> torch.Tensor:
    """What layers (weight, bias) with SiLU between them make of the bits of the labels 0 to 255: (256, values)."""
    values = bits_of_labels()
    for i, (weight, bias) in enumerate(layers):
        values = F.linear(values if i == 0 else F.silu(values), weight, bias)
    return values


def deviations_of(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Standard deviations (n,) of values (256, n) of labels that have so many voxels (256,)."""
    shares = (counts / counts.sum())[:, None]
    return (shares * (values - (shares * values).sum(0)).square()).sum(0).sqrt()


@torch.enable_grad()
def fit_bits(wanted: torch.Tensor, counts: torch.Tensor, width: int, seed: int) -> Layers:
    """
    Layers of `width`, `width` and n channels that make the wanted values (256, n) of the bits of the labels, the best
    of several. Labels count by the square root of the number of their voxels (256,): where not all can be met, large
    ones would else be missed as far as small ones, or small ones altogether.
    """
    generator = torch.Generator().manual_seed(seed)
    present, number = counts > 0, wanted.shape[1]
    bits = bits_of_labels()[present].expand(RESTARTS, -1, -1)
    shares = (counts[present].sqrt() / counts[present].sqrt().sum())[:, None]
    mean = (shares * wanted[present]).sum(0)
    deviation = (shares * (wanted[present] - mean).square()).sum(0).sqrt().clamp(min=1e-6)
    target = ((wanted[present] - mean) / deviation).expand(RESTARTS, -1, -1)
    widths = (8, width, width, number)
    weights = [torch.randn(RESTARTS, n, m, generator=generator).requires_grad_() for m, n in pairwise(widths)]
    biases = [torch.randn(RESTARTS, n, generator=generator).requires_grad_() for n in widths[1:]]
    optimizer = torch.optim.Adam([*weights, *biases], lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, FIT_RATE, total_steps=FIT_STEPS)
    for _ in range(FIT_STEPS):
        values = bits
        for i, (weight, bias) in enumerate(zip(weights, biases)):
            values = (values if i == 0 else F.silu(values)) @ weight.mT + bias[:, None]
        losses = (shares * (values - target).square()).sum((1, 2))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
    best = losses.argmin()
    layers = [(weight[best].detach(), bias[best].detach()) for weight, bias in zip(weights, biases)]
    layers[2] = (layers[2][0] * deviation[:, None], layers[2][1] * deviation + mean)
    return layers
