"""The ControlNet's and the mask VAE's input: a label map written in binary."""

import torch


def label_bits(labels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Eight channels of 0 and 1, one a bit of the label, least significant first.

    Args:
        labels: integer labels 0..255, (N, 1, X, Y, Z) or (N, X, Y, Z).
        dtype: of the result.

    Returns:
        Tensor (N, 8, X, Y, Z) on the device of `labels`.

    Raises:
        ValueError: for another shape, a floating-point data type, or labels outside 0..255.
    """
    if labels.ndim == 5 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 4:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, must be (N, 1, X, Y, Z) or (N, X, Y, Z); add or squeeze axes."
        )
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}, must be integers 0..255; round them and call .to(torch.uint8).")
    if labels.dtype != torch.uint8:
        low, high = (int(extreme) for extreme in labels.aminmax())
        if low < 0 or high > 255:
            raise ValueError(f"labels range from {low} to {high}, must lie in 0..255; relabel them.")
        labels = labels.to(torch.uint8)

    # One bit at a time: a 512x512x512 map has no room for eight 64-bit copies.
    bits = torch.empty((labels.shape[0], 8, *labels.shape[1:]), dtype=dtype, device=labels.device)
    for bit in range(8):
        bits[:, bit] = (labels >> bit) & 1
    return bits
