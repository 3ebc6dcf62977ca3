"""The losses of the diffusion networks."""

import pytest
import torch
import torch.nn.functional as F

from maisi_diffusers.training.losses import label_weights, region_contrastive_loss, weighted_error

RATIO = 4
LATENT = (2, 4, 3, 4, 5)
VOLUME = (2, 1, 12, 16, 20)


@pytest.fixture
def labels():
    """With a tumor, 129, of another size in each half of the batch; and without it."""
    labels = torch.ones(VOLUME, dtype=torch.uint8)
    labels[0, 0, 3:9, 4:9, 4:12] = 129
    labels[1, 0, 5:12, :6, 9:17] = 129
    return labels, torch.ones_like(labels)


@pytest.fixture
def predictions():
    """With tumors, without, and the target."""
    draws = torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(0))
    return draws[0].requires_grad_(), draws[1].requires_grad_(), draws[2]


def contrast(predictions, labels, **kwargs):
    return region_contrastive_loss(*predictions, *labels, RATIO, **kwargs)


def test_label_weights():
    """As nearest resampling, then weights."""
    labels = torch.randint(1, 6, VOLUME, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nearest = F.interpolate(labels.float(), size=LATENT[2:], mode="nearest")
    expected = torch.ones_like(nearest)
    expected[(nearest == 2) | (nearest == 5)] = 100
    weights = label_weights(labels, [2, 5], 100.0, RATIO)
    assert torch.equal(weights, expected) and 0.2 < (weights == 100).float().mean() < 0.6


def test_weighted_error(predictions):
    prediction, _, target = predictions
    error = (prediction - target).abs()
    assert torch.equal(weighted_error(prediction, target), error.mean())
    weights = torch.ones(2, 1, 3, 4, 5)
    weights[0, 0, 1] = 100
    expected = (error.sum() + 99 * error[0, :, 1].sum()) / error.numel()
    assert torch.allclose(weighted_error(prediction, target, weights), expected)
    half = weighted_error(prediction.bfloat16(), target.bfloat16())
    assert half.dtype == torch.float32 and torch.allclose(half, error.mean(), rtol=1e-2)
    squared = weighted_error(prediction, target, weights, "l2")
    assert torch.allclose(squared, (error**2 * weights).mean())


def test_region_contrastive_loss(predictions, labels):
    """Both terms by hand, the dilation by a voxel at full resolution."""
    prediction, tumor_free, target = predictions
    is_tumor = (labels[0] == 129).float()
    tumor = F.interpolate(is_tumor, size=LATENT[2:], mode="nearest").expand(LATENT)
    dilated = F.interpolate(F.max_pool3d(is_tumor, 3, 1, 1), size=LATENT[2:], mode="nearest").expand(LATENT)
    assert 0 < tumor.mean() < dilated.mean() < 1
    apart = (prediction - tumor_free).abs()[tumor == 1].mean()
    pulled = (tumor_free - target).abs()[dilated == 0].mean()
    assert apart < 2  # its bound
    assert torch.allclose(contrast(predictions, labels), pulled - apart, rtol=1e-5)


def test_gradients_go_where_they_should(predictions, labels):
    prediction, tumor_free, target = predictions
    contrast(predictions, labels).backward()
    tumor = F.interpolate((labels[0] == 129).float(), size=LATENT[2:], mode="nearest").expand(LATENT) == 1
    # The prediction with tumors moves away in them, and nowhere else.
    assert torch.equal(prediction.grad != 0, tumor)
    assert torch.equal(prediction.grad.sign()[tumor], -(prediction - tumor_free).sign()[tumor])
    assert torch.equal(tumor_free.grad[tumor], -prediction.grad[tumor])
    pulled = (tumor_free.grad != 0) & ~tumor
    assert pulled.any() and torch.equal(tumor_free.grad.sign()[pulled], (tumor_free - target).sign()[pulled])


def test_beyond_the_bound_only_the_background_counts(predictions, labels):
    prediction, tumor_free, target = predictions
    below, beyond = contrast(predictions, labels, bound=10.0), contrast(predictions, labels, bound=0.5)
    apart = (prediction - tumor_free).abs()
    tumor = F.interpolate((labels[0] == 129).float(), size=LATENT[2:], mode="nearest").expand(LATENT) == 1
    assert torch.allclose(beyond, below + apart[tumor].mean() - 0.5, rtol=1e-5)
    beyond.backward()
    assert not prediction.grad.any() and not tumor_free.grad[tumor].any() and tumor_free.grad.any()


def test_without_tumors(predictions, labels):
    healthy = labels[1]
    _, tumor_free, target = predictions
    loss = contrast(predictions, (healthy, healthy))
    assert torch.allclose(loss, (tumor_free - target).abs().mean())
    loss.backward()
    assert torch.isfinite(tumor_free.grad).all() and not predictions[0].grad.any()


@pytest.mark.parametrize("bound", [10.0, 0.5])
def test_two_halves_are_the_whole(predictions, labels, bound):
    """
    Two processes with half of a batch each: the mean of their losses and gradients is the whole batch's, whose tumors
    count alike wherever they are.
    """
    whole = contrast(predictions, labels, bound=bound)
    whole.backward()
    expected = [prediction.grad.clone() for prediction in predictions[:2]]
    for prediction in predictions[:2]:
        prediction.grad = None

    halves = [[value[i : i + 1] for value in (*predictions, *labels)] for i in range(2)]
    sums = []
    for half in halves:
        region_contrastive_loss(*half, RATIO, bound, total=lambda values: sums.append(values) or values)
    assert sums[0][1] != sums[1][1]  # unequal halves: their own means would not do
    losses = [
        region_contrastive_loss(*half, RATIO, bound, total=lambda _: sums[0] + sums[1], num_processes=2)
        for half in halves
    ]
    mean = sum(losses) / 2
    mean.backward()
    assert torch.allclose(mean, whole, rtol=1e-5)
    for prediction, gradient in zip(predictions, expected):
        assert torch.allclose(prediction.grad, gradient, rtol=1e-5, atol=1e-8)
