"""What a VAE is trained to, for images and for label maps: what goes in, the losses of what comes out, its metrics."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..anatomy import MASK_VAE_LABELS, label_bits
from .discriminator import MaisiPatchDiscriminator
from .mask_classes import mask_classes
from .patches import LabelPatchDataset, PatchDataset
from .vae_losses import adversarial_loss, dice_and_accuracy, label_losses

RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class ImageObjective:
    """
    Reconstruction, perceptual and adversarial loss of images, as published.

    Args:
        reconstruction_loss: `"l1"`, or `"l2"` for the mean square: noise counts less in it, edges and bone more.
        perceptual_weight: of the perceptual loss.
        perceptual: (reconstruction, image, generators) to the perceptual loss; without it, it is left out.
        adversarial_weight: of the adversarial loss.
        discriminator: unwrapped, so that its own gradients are left alone; without it, the adversarial loss is left
            out.
        draws: (batch, purpose) to a generator for each of its images.
    """

    of: ClassVar[str] = "volumes"
    dataset_class: ClassVar[type] = PatchDataset

    def __init__(
        self,
        reconstruction_loss: str,
        perceptual_weight: float,
        perceptual: Callable | None,
        adversarial_weight: float,
        discriminator: MaisiPatchDiscriminator | None,
        draws: Callable[[dict[str, torch.Tensor], str], list[torch.Generator]],
    ):
        self.weights = {
            "reconstruction_loss": 1.0,
            "perceptual_loss": perceptual_weight,
            "adversarial_loss": adversarial_weight,
        }
        self.reconstruction = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.draws = draws

    def vae_input(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the VAE encodes, (N, 1, X, Y, Z)."""
        return batch["image"]

    def losses(self, batch: dict[str, torch.Tensor], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of a batch of [`PatchDataset`] and what the VAE makes of it, (N, 1, X, Y, Z)."""
        image = batch["image"]
        losses = {"reconstruction_loss": self.reconstruction(reconstruction, image)}
        if self.perceptual is not None:
            losses["perceptual_loss"] = self.perceptual(reconstruction, image, self.draws(batch, "perceptual"))
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
            losses["adversarial_loss"] = adversarial_loss(self.discriminator(reconstruction), is_real=True)
            self.discriminator.requires_grad_(True)
        return losses

    def metrics(self, batch: dict[str, torch.Tensor], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        """L1 and PSNR of one image."""
        error = reconstruction - batch["image"]
        return {"l1": error.abs().mean(), "psnr": -10 * error.square().mean().log10()}


class LabelObjective:
    """
    Cross-entropy and soft Dice loss of label maps, see [`label_losses`].

    Args:
        cross_entropy_weight, dice_weight: of the two losses.
        balance: how much more a voxel of a small class weighs in the cross-entropy, 0 to 1.
    """

    of: ClassVar[str] = "label maps"
    dataset_class: ClassVar[type] = LabelPatchDataset

    def __init__(self, cross_entropy_weight: float, dice_weight: float, balance: float):
        self.weights = {"cross_entropy_loss": cross_entropy_weight, "dice_loss": dice_weight}
        self.balance = balance

    def vae_input(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the VAE encodes, (N, 8, X, Y, Z)."""
        return label_bits(batch["labels"])

    def losses(self, batch: dict[str, torch.Tensor], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of a batch of [`LabelPatchDataset`] and of the VAE's logits, (N, 125, X, Y, Z)."""
        cross_entropy, dice_loss = label_losses(reconstruction, mask_classes(batch["labels"]), self.balance)
        return {"cross_entropy_loss": cross_entropy, "dice_loss": dice_loss}

    def metrics(self, batch: dict[str, torch.Tensor], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        """Dice score, the mean over the classes that one label map has, and the share of voxels that are right."""
        dice, accuracy = dice_and_accuracy(reconstruction[0].argmax(0), mask_classes(batch["labels"])[0, 0])
        return {"dice": dice, "accuracy": accuracy}


def objective_class(vae_config: dict) -> type[ImageObjective] | type[LabelObjective]:
    """
    Which of the two a VAE is for.

    Raises:
        ValueError: if it is neither an image VAE nor a mask VAE.
    """
    kinds = {(1, 1): ImageObjective, (8, len(MASK_VAE_LABELS)): LabelObjective}
    channels = vae_config["in_channels"], vae_config["out_channels"]
    if channels not in kinds:
        raise ValueError(
            f"a VAE with in_channels={channels[0]} and out_channels={channels[1]} is neither one of images, 1 and 1, "
            f"nor one of label maps, 8 and {len(MASK_VAE_LABELS)}: correct its config"
        )
    return kinds[channels]
