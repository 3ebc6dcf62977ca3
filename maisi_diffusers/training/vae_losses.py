"""The losses of VAE training that torch does not have: of the image VAE as published, of the mask VAE ours."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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


def label_losses(logits: torch.Tensor, classes: torch.Tensor, balance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How far the mask VAE's output is from a label map, such that thin structures count beside the body: weighted
    cross-entropy, and a soft Dice loss in which every class that a map has counts alike, whatever its size.

    One map after the other, and recomputed for the gradients: besides the logits and their gradients, no more than a
    few times the logits of one map are in memory.

    Args:
        logits (N, C, X, Y, Z): a channel a class.
        classes (N, 1, X, Y, Z): int64.
        balance: a voxel weighs `n ** -balance`, with n the voxels of its class in the map. 0 weighs all voxels
            alike, 1 all classes.

    Returns:
        cross-entropy, and 1 minus the Dice score, both means over the maps.
    """
    of_each = [checkpoint(_losses_of_map, *pair, balance, use_reentrant=False) for pair in zip(logits, classes)]
    cross_entropy, dice_loss = zip(*of_each)
    return torch.stack(cross_entropy).mean(), torch.stack(dice_loss).mean()


def _losses_of_map(logits: torch.Tensor, classes: torch.Tensor, balance: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_probabilities = logits.float().flatten(1).log_softmax(0)
    classes = classes.flatten()
    sizes = classes.bincount(minlength=len(logits))
    log_own = log_probabilities.gather(0, classes[None])[0]  # of the class that a voxel has

    weights = sizes.clamp(min=1).float().pow(-balance)[classes]
    cross_entropy = -(weights * log_own).sum() / weights.sum()

    overlaps = torch.zeros_like(log_probabilities[:, 0]).index_add(0, classes, log_own.exp())
    dice = 2 * overlaps / (log_probabilities.exp().sum(1) + sizes)
    return cross_entropy, 1 - dice[sizes > 0].mean()


def dice_and_accuracy(predicted: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Dice score of a label map, the mean over the classes that it has, and the share of its voxels that are right.

    Args:
        predicted (X, Y, Z): the class of every voxel, int64.
        classes (X, Y, Z): what it should be, int64.
    """
    predicted, classes = predicted.flatten(), classes.flatten()
    is_right = predicted == classes
    length = int(max(predicted.max(), classes.max())) + 1
    sizes = classes.bincount(minlength=length)
    dice = 2 * classes[is_right].bincount(minlength=length) / (sizes + predicted.bincount(minlength=length))
    return dice[sizes > 0].mean(), is_right.float().mean()
