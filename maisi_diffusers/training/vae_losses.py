"""The losses of VAE training that torch does not have, as published."""

import torch
import torch.nn.functional as F


def kl_loss(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the posterior from the standard normal, summed over a latent and averaged over the
    batch: it grows with the size of a patch, and so small is its published weight (1e-7).

    The published code takes the logarithm of `exp(logvar) + 1e-10` instead, the same for any logvar above -15. Below,
    that gives no gradient to bring the variance back.

    Args:
        mean (N, C, x, y, z): of the posterior.
        logvar (N, C, x, y, z): of the posterior.
    """
    mean, logvar = mean.float(), logvar.float()  # the sum of a large patch is more than float16 holds
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum() / len(mean)


def adversarial_loss(logits: torch.Tensor, is_real: bool) -> torch.Tensor:
    """
    Least-squares loss of what the discriminator says, with 1 for real and 0 for reconstructed.

    As published, negative logits count a twentieth. The autoencoder is trained by its reconstructions as real ones;
    the discriminator by half of the sum over real ones as real and reconstructions (detached) as not.

    Args:
        logits (N, 1, x, y, z): of [`MaisiPatchDiscriminator`].
        is_real: what they should say.
    """
    return (F.leaky_relu(logits.float(), 0.05) - float(is_real)).square().mean()
