import pytest
import torch
from monai.losses import PatchAdversarialLoss

from maisi_diffusers.training.vae_losses import adversarial_loss, kl_loss
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
