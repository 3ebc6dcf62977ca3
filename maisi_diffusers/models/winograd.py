"""
Convolutions of kernel 3 with fewer multiplications, after
[Winograd, 1980](https://doi.org/10.1137/1.9781611970364) and [Lavin and Gray, 2016](https://arxiv.org/abs/1509.09308).

Along an axis two neighbouring results of three taps take four products instead of six, F(2, 3): of sums of four inputs
with sums of the taps. Along X and Y together 4 x 4 products do what 6 x 6 did; along Z taps stay as they are, which
leaves convolutions that a library is fast at. Where all is rounded to 16 bits, a convolution has twice the error with
fewer products along X, and 3 to 4 times with fewer along X and Y.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

TAPS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
AT_ONCE = 40e6  # bytes of planes whose sums and products, about as much again, are there at once


def transform_weight(weight: torch.Tensor) -> list[list[torch.Tensor]]:
    """(C', C, 3, 3, 3) -> for each of 4 x 4 products along X and Y its weight (C', C, 1, 3)."""
    taps = weight.new_tensor(TAPS)
    products = torch.einsum("ix,jy,ocxyz->ijocz", taps, taps, weight)[:, :, :, :, None]
    return [[one.contiguous(memory_format=torch.channels_last) for one in row] for row in products]


def transform_weight_along_x(weight: torch.Tensor) -> list[torch.Tensor]:
    """(C', C, 3, 3, 3) -> for each of 4 products along X its weight (C', C, 3, 3)."""
    products = torch.einsum("ix,ocxyz->iocyz", weight.new_tensor(TAPS, dtype=torch.float32), weight.float())
    return [one.to(weight.dtype, memory_format=torch.channels_last) for one in products]


def convolve(
    planes: torch.Tensor, weight: list[torch.Tensor] | list[list[torch.Tensor]], bias: torch.Tensor | None
) -> torch.Tensor:
    """
    A convolution of kernel 3.

    Args:
        planes (X + 2, C, Y + 2, Z): padded along X and Y, which are even (Y only for fewer products along both); the
            channels of a voxel lie side by side.
        weight: see [`transform_weight`], for fewer products along X and Y, or [`transform_weight_along_x`].
        bias (C').

    Returns:
        (X, C', Y, Z), in the same layout.
    """
    is_along_x = isinstance(weight[0], torch.Tensor)
    size_x, channels, size_y, size_z = planes.shape
    out_channels = len(weight[0] if is_along_x else weight[0][0])
    result = planes.new_empty(size_x - 2, size_y - 2, size_z, out_channels).permute(0, 3, 1, 2)
    row = size_x * size_z * max(channels, out_channels) * planes.itemsize
    num_rows = max(int(AT_ONCE / row) // 2, 1) * 2
    add_products = add_products_along_x if is_along_x else add_products_along_both
    for start in range(0, size_y - 2, num_rows):
        stop = min(start + num_rows, size_y - 2)
        add_products(planes[:, :, start : stop + 2], weight, bias, result[:, :, start:stop])
    return result


def add_products_along_both(
    planes: torch.Tensor, weight: list[list[torch.Tensor]], bias: torch.Tensor | None, result: torch.Tensor
) -> None:
    """Write what [`convolve`] gives for some rows."""
    rows = []
    for part, weights in zip(split(planes, 0), weight):
        # Planes are a batch of images: as volumes, few of them take several times as long.
        products = [F.conv2d(of_rows, one, padding=(0, 1)) for of_rows, one in zip(split(part, 2), weights)]
        rows.append(merge(products))
    for j in range(2):
        for i, part in enumerate(merge([row[j] for row in rows])):
            result[i::2, :, j::2] = part if bias is None else part.add_(bias[:, None, None])


def add_products_along_x(
    planes: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, result: torch.Tensor
) -> None:
    """Write what [`convolve`] gives for some rows, with fewer products along X alone."""
    biases = [None, bias, None, None]  # the second product is in all results
    products = [F.conv2d(part, *of_part, padding=(0, 1)) for part, *of_part in zip(split(planes, 0), weight, biases)]
    for i, part in enumerate(merge(products)):
        result[i::2] = part


def split(x: torch.Tensor, axis: int) -> Iterator[torch.Tensor]:
    """The sums of inputs that the four products are of: for every second position of an axis."""
    before = [slice(None)] * axis
    first, second, third, fourth = (x[(*before, slice(i, x.shape[axis] - 2 + i // 2 * 2, 2))] for i in range(4))
    yield first - third
    yield second + third
    yield third - second
    yield second - fourth


def merge(products: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The results at even and at odd positions, of the four products, which are overwritten."""
    first, second, third, fourth = products
    even = first.add_(second).add_(third)
    return even, second.sub_(third).sub_(fourth)
