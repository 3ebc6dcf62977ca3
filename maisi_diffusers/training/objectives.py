"""What one training step of the UNet or the ControlNet computes: a batch to its losses, no optimiser."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..anatomy import label_bits
from ..models import MaisiControlNetModel, MaisiUNet3DConditionModel
from ..schedulers import MaisiRFlowScheduler
from .losses import label_weights, region_contrastive_loss, weighted_error


@dataclass
class DiffusionObjective:
    """
    Error between the UNet's prediction and its target.

    Args:
        unet: the UNet, wrapped for distributed training or not.
        unet_config: its config.
        scheduler: adds the noise and says what is predicted.
        scaling_factor: of the latents.
        loss_type: `"l1"` or `"l2"`.
        ratio: voxels of a label map to a latent voxel, along each axis.
        weighted_labels: labels whose voxels weigh `weighted_loss` instead of 1; batches have label maps then.
        weighted_loss: their weight.
    """

    unet: MaisiUNet3DConditionModel
    unet_config: dict
    scheduler: SchedulerMixin
    scaling_factor: float
    loss_type: str = "l1"
    ratio: int = 4
    weighted_labels: tuple[int, ...] = ()
    weighted_loss: float = 1.0

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of [`LatentDataset`] -> {"loss": scalar}."""
        latents, target = noisy_latents_and_target(batch, self.scheduler, self.scaling_factor)
        conditions = unet_conditions(batch, self.unet_config)
        prediction = self.unet(latents, batch["timesteps"], **conditions, return_dict=False)[0]
        weights = weights_of(batch, self.weighted_labels, self.weighted_loss, self.ratio)
        return {"loss": weighted_error(prediction, target, weights, self.loss_type)}


@dataclass
class ControlNetObjective:
    """
    Error between the steered UNet's prediction and its target, new classes weighted, optionally with the
    region-contrastive loss. If the UNet is frozen, nothing before its middle block is differentiated.

    Args:
        controlnet: the ControlNet, wrapped for distributed training or not.
        controlnet_config: its config.
        unet: the UNet, frozen and in any dtype, or trained too and wrapped or not.
        unet_config: its config.
        scheduler: adds the noise and says what is predicted.
        scaling_factor: of the latents.
        loss_type: `"l1"` or `"l2"`.
        ratio: voxels of a label map to a latent voxel, along each axis.
        weighted_labels: labels whose voxels weigh `weighted_loss` instead of 1.
        weighted_loss: their weight.
        region_contrastive_weight: factor on the region-contrastive loss; 0 leaves it and its second pass out.
        region_contrastive_bound: mean difference that it asks for inside tumors, at most.
        total: sum of a tensor over processes.
        num_processes: number of processes.
    """

    controlnet: MaisiControlNetModel
    controlnet_config: dict
    unet: MaisiUNet3DConditionModel
    unet_config: dict
    scheduler: SchedulerMixin
    scaling_factor: float
    loss_type: str = "l1"
    ratio: int = 4
    weighted_labels: tuple[int, ...] = ()
    weighted_loss: float = 1.0
    region_contrastive_weight: float = 0.0
    region_contrastive_bound: float = 2.0
    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    num_processes: int = 1

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of [`LatentDataset`] with label maps -> {"loss": scalar, and the parts it has}."""
        latents, target = noisy_latents_and_target(batch, self.scheduler, self.scaling_factor)
        labels = batch["labels"]
        weights = weights_of(batch, self.weighted_labels, self.weighted_loss, self.ratio)
        if not self.region_contrastive_weight:
            return {"loss": weighted_error(self.predict(batch, latents, labels), target, weights, self.loss_type)}

        # One pass with and without the tumors, so that a wrapped ControlNet runs once a step.
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        both = torch.cat([labels, batch["tumor_free_labels"]])
        prediction, tumor_free_prediction = self.predict(twice, torch.cat([latents, latents]), both).chunk(2)
        reconstruction = weighted_error(prediction, target, weights, self.loss_type)
        contrast = region_contrastive_loss(
            prediction,
            tumor_free_prediction,
            target,
            labels,
            batch["tumor_free_labels"],
            self.ratio,
            self.region_contrastive_bound,
            self.total,
            self.num_processes,
        )
        return {
            "loss": reconstruction + self.region_contrastive_weight * contrast,
            "reconstruction_loss": reconstruction,
            "region_contrastive_loss": contrast,
        }

    def predict(self, batch: dict[str, torch.Tensor], latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What the UNet predicts for noisy latents (N, C, x, y, z) when label maps (N, 1, X, Y, Z) steer it."""
        class_labels = batch["class_labels"] if self.controlnet_config["num_class_embeds"] is not None else None
        down_block_res_samples, mid_block_res_sample = self.controlnet(
            latents,
            batch["timesteps"],
            controlnet_cond=label_bits(labels, torch.uint8),  # a quarter of the memory that floats take
            class_labels=class_labels,
            return_dict=False,
        )
        dtype = next(self.unet.parameters()).dtype
        return self.unet(
            latents.to(dtype),
            batch["timesteps"],
            **unet_conditions(batch, self.unet_config),
            down_block_additional_residuals=tuple(sample.to(dtype) for sample in down_block_res_samples),
            mid_block_additional_residual=mid_block_res_sample.to(dtype),
            return_dict=False,
        )[0]


def noisy_latents_and_target(
    batch: dict[str, torch.Tensor], scheduler: SchedulerMixin, scaling_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents with noise at their timesteps, and what a network is to predict from them: both (N, C, x, y, z)."""
    latents, noise, timesteps = batch["latents"] * scaling_factor, batch["noise"], batch["timesteps"]
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    if noisy_latents.device.type == "cpu":  # where convolutions of few channels learn faster with these side by side
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last_3d)
    if isinstance(scheduler, MaisiRFlowScheduler) or scheduler.config.prediction_type == "v_prediction":
        return noisy_latents, scheduler.get_velocity(latents, noise, timesteps)
    return noisy_latents, noise if scheduler.config.prediction_type == "epsilon" else latents


def weights_of(
    batch: dict[str, torch.Tensor], weighted_labels: tuple[int, ...], weight: float, ratio: int
) -> torch.Tensor | None:
    """Weights (N, 1, x, y, z) of a batch's latent voxels; None where all weigh the same."""
    if not weighted_labels or weight == 1:
        return None
    return label_weights(batch["labels"], weighted_labels, weight, ratio)


def unet_conditions(batch: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The conditions of a batch that a UNet with this config takes."""
    taken = {
        "encoder_hidden_states": config["cross_attention_dim"] is not None,
        "class_labels": config["num_class_embeds"] is not None,
        "spacing": config["use_spacing"],
        "top_region_index": config["use_region_index"],
        "bottom_region_index": config["use_region_index"],
    }
    return {name: batch[name] for name, is_taken in taken.items() if is_taken}
