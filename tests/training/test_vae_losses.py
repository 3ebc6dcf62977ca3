import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, PatchAdversarialLoss

from maisi_diffusers.training.vae_losses import adversarial_loss, dice_and_accuracy, kl_loss, label_losses
from tests.tiny import seeded


def posterior(shape=(2, 4, 3, 5, 2), dtype=torch.float32):
    generator = seeded()
    mean = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    logvar = (3 * torch.randn(shape, generator=generator) - 2).to(dtype).requires_grad_()
    return mean, logvar


def published_kl(mean, logvar):
    """In the terms of the published code, which has the standard deviation."""
    sigma = torch.exp(logvar / 2)
    summands = mean**2 + sigma**2 - torch.log(sigma**2 + 1e-10) - 1
    return (summands.flatten(1).sum(1) / 2).mean()


def test_kl_is_the_divergence_of_two_gaussians():
    mean, logvar = posterior()
    gaussian = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(gaussian, standard).sum() / 2  # two posteriors
    torch.testing.assert_close(kl_loss(mean, logvar), expected)
    assert kl_loss(torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 4, 2, 2, 2)) == 0


def test_kl_as_published_with_its_gradients():
    mean, logvar = posterior()
    ours, theirs = kl_loss(mean, logvar), published_kl(mean, logvar)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, (mean, logvar)) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_kl_of_a_vanished_variance_has_a_gradient_where_the_published_has_none():
    logvar = torch.full((1, 1, 1, 1, 1), -30.0, requires_grad=True)
    (ours,) = torch.autograd.grad(kl_loss(torch.zeros_like(logvar), logvar), logvar)
    (theirs,) = torch.autograd.grad(published_kl(torch.zeros_like(logvar), logvar), logvar)
    assert ours.item() == pytest.approx(-0.5)
    assert abs(theirs.item()) < 1e-3


def test_kl_of_half_precision_does_not_overflow():
    mean, logvar = posterior((1, 4, 24, 24, 24), torch.float16)
    expected = kl_loss(mean.double(), logvar.double())
    assert expected > torch.finfo(torch.float16).max
    torch.testing.assert_close(kl_loss(mean, logvar).double(), expected.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("is_real", [True, False])
def test_adversarial_loss_is_monais(is_real):
    logits = (2 * torch.randn(2, 1, 4, 3, 5, generator=seeded())).requires_grad_()
    monai = PatchAdversarialLoss(criterion="least_squares")
    ours = adversarial_loss(logits, is_real)
    theirs = monai(logits, target_is_real=is_real, for_discriminator=True)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    if is_real:
        assert ours == monai(logits, target_is_real=True, for_discriminator=False)


def test_adversarial_loss_is_least_where_the_logits_say_so():
    ones, zeros = torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    assert adversarial_loss(ones, True) == adversarial_loss(zeros, False) == 0
    assert adversarial_loss(ones, False) == adversarial_loss(zeros, True) == 1


def label_maps(num_maps=2, num_classes=7, shape=(4, 5, 6)):
    """Logits, and classes of which each map has some only."""
    logits = torch.randn((num_maps, num_classes, *shape), generator=seeded()).requires_grad_()
    classes = torch.stack([torch.randint(0, 2 + i, (1, *shape), generator=seeded(i)) for i in range(num_maps)])
    return logits, classes


def test_dice_loss_is_of_the_classes_a_map_has():
    logits, classes = label_maps()
    scores = []
    for one_logits, one_classes in zip(logits, classes):
        one_hot = F.one_hot(one_classes[0], logits.shape[1]).movedim(-1, 0)
        dice = DiceLoss(softmax=True, reduction="none", smooth_nr=0, smooth_dr=0)
        loss = dice(one_logits[None], one_hot[None]).flatten()
        scores.append(loss[one_classes.unique()].mean())
    torch.testing.assert_close(label_losses(logits, classes, 0.5)[1], torch.stack(scores).mean())


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_cross_entropy_weighs_small_classes(balance):
    logits, classes = label_maps()
    expected = []
    for one_logits, one_classes in zip(logits, classes):
        weight = torch.bincount(one_classes.flatten(), minlength=logits.shape[1]).clamp(min=1).float() ** -balance
        expected.append(F.cross_entropy(one_logits[None], one_classes, weight))
    torch.testing.assert_close(label_losses(logits, classes, balance)[0], torch.stack(expected).mean())


def test_perfect_label_maps_lose_nothing():
    logits, classes = label_maps()
    perfect = 50 * F.one_hot(classes[:, 0], logits.shape[1]).movedim(-1, 1).float()
    for loss in label_losses(perfect, classes, 0.5):
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_every_map_has_gradients():
    logits, classes = label_maps()
    sum(label_losses(logits, classes, 0.5)).backward()
    assert logits.grad.isfinite().all() and (logits.grad.abs().sum((1, 2, 3, 4)) > 0).all()


def test_a_thin_structure_counts_beside_the_body():
    """One voxel of a thousand, missed: as much of the loss as missing half of all is of plain cross-entropy."""
    classes = torch.zeros(1, 1, 10, 10, 10, dtype=torch.int64)
    classes[0, 0, 5, 5, 5] = 1
    logits = torch.zeros(1, 3, 10, 10, 10)
    logits[:, 0] = 10.0
    plain, balanced = (label_losses(logits, classes, balance) for balance in (0.0, 0.5))
    assert balanced[0] > 20 * plain[0] and plain[1] == pytest.approx(0.5, abs=0.01)


def test_dice_and_accuracy():
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]).reshape(2, 2, 2)
    predicted = torch.tensor([0, 0, 0, 3, 1, 1, 1, 0]).reshape(2, 2, 2)
    dice, accuracy = dice_and_accuracy(predicted, classes)
    assert accuracy == 5 / 8
    assert dice.item() == pytest.approx(((2 * 3 / 8) + (2 * 2 / 5) + 0) / 3)
