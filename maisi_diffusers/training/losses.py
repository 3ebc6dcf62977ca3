"""The losses of the diffusion networks, as published.

Predictions and targets are (N, C, x, y, z) on the latent grid and compared in float32; label maps are (N, 1, X, Y, Z)
on the volume's grid, a whole multiple of it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

LOSS_TYPES = {"l1": torch.abs, "l2": torch.square}


def label_weights(labels: torch.Tensor, weighted_labels: tuple[int, ...], weight: float, ratio: int) -> torch.Tensor:
    """Weight of each latent voxel, (N, 1, x, y, z): `weight` where the nearest voxel has one of the labels, else 1."""
    is_weighted = torch.isin(_nearest(labels, ratio), torch.tensor(weighted_labels, device=labels.device))
    return torch.where(is_weighted, weight, 1.0)


def weighted_error(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None, loss_type: str = "l1"
) -> torch.Tensor:
    """
    Mean absolute (`"l1"`) or squared (`"l2"`) error, each voxel times its weight (N, 1, x, y, z). The mean is over
    voxels, not over weights.
    """
    error = LOSS_TYPES[loss_type](prediction.float() - target.float())
    return error.mean() if weights is None else (error * weights).mean()


def region_contrastive_loss(
    prediction: torch.Tensor,
    tumor_free_prediction: torch.Tensor,
    target: torch.Tensor,
    labels: torch.Tensor,
    tumor_free_labels: torch.Tensor,
    ratio: int,
    bound: float = 2.0,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    num_processes: int = 1,
) -> torch.Tensor:
    """
    What the label map's tumors are to change, and what not.

    Inside the tumors the predictions with and without them are pushed apart, up to a mean difference of `bound`; more
    than a voxel away from them the prediction without is pulled to the target.

    Both terms are means over the tumors and the background of the whole batch. Where several processes have a part of
    it each, the mean of what they return, and of its gradients, is the loss of the whole batch.

    Args:
        prediction: with the label map.
        tumor_free_prediction: with the tumor-free label map, from the same noisy latent.
        target: what the prediction is trained to.
        labels: the label map.
        tumor_free_labels: the label map without tumors.
        ratio: voxels of the label map to a latent voxel, along each axis.
        bound: difference above which the first term gives no gradient.
        total: sum of a tensor over processes.
        num_processes: number of processes.
    """
    is_tumor = (labels != tumor_free_labels).to(torch.float32)
    tumor = _nearest(is_tumor, ratio)
    # Dilated by one voxel at full resolution; only every `ratio`-th voxel is asked for.
    background = 1 - F.max_pool3d(is_tumor, kernel_size=3, stride=ratio, padding=1)

    prediction, tumor_free_prediction = prediction.float(), tumor_free_prediction.float()
    channels = prediction.shape[1]
    difference = ((prediction - tumor_free_prediction).abs() * tumor).sum()
    error = ((tumor_free_prediction - target.float()).abs() * background).sum()
    sums = total(torch.stack([difference.detach(), tumor.sum() * channels, background.sum() * channels]))
    num_tumor, num_background = sums[1] + 1e-5, sums[2] + 1e-5

    apart = -difference * num_processes / num_tumor
    apart = torch.where(sums[0] / num_tumor < bound, apart, -bound)
    return apart + error * num_processes / num_background


def _nearest(volume: torch.Tensor, ratio: int) -> torch.Tensor:
    """Nearest resampling to the latent grid as published, which takes the first of every `ratio` voxels."""
    return volume[..., ::ratio, ::ratio, ::ratio]
