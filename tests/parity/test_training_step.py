"""One training step of the ControlNet and of the UNet: the losses and gradients of MONAI's networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.transforms.utils_morphological_ops import dilate

from maisi_diffusers.anatomy import TUMORS, remove_tumors
from maisi_diffusers.loaders.key_mapping import unet_source_keys
from maisi_diffusers.training.objectives import ControlNetObjective, DiffusionObjective

from .monai_reference import SCALE_FACTOR, label_bits, make_scheduler

# Of the largest value. The loss itself is compared in absolute terms.
TOLERANCE = 1e-5
WEIGHT, WEIGHTED_LABELS = 100.0, (23, 26)


@pytest.fixture
def batch(pair):
    return make_batch(pair)


def make_batch(pair) -> dict[str, torch.Tensor]:
    """Latents, noise, timesteps and conditions of two cases, and label maps with tumors in them."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 4, *pair.size.latent)
    volume = [4 * n for n in pair.size.latent]
    labels = np.full((2, 1, *volume), 200, dtype=np.uint8)
    labels[:, :, 2:-2, 2:-2, 2:9] = 1
    labels[:, :, 5:-5, 5:-5, 4:8] = 26
    labels[:, :, 1:-1, 1:-1, 10:] = 28
    labels[1, :, 3:10, 3:9, 11:15] = 23
    healthy = np.stack([[remove_tumors(case[0], tumors=TUMORS)] for case in labels])
    regions = torch.eye(4)[torch.randint(4, (2, 2), generator=generator)] * 100
    is_rflow = pair.version.startswith("rflow")
    timesteps = torch.rand(2, generator=generator) * 1000 if is_rflow else torch.tensor([17, 803])
    return {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "timesteps": timesteps,
        "class_labels": torch.tensor([1, 3]),
        "spacing": torch.tensor([[150.0, 150.0, 200.0], [70.0, 70.0, 300.0]]),
        "top_region_index": regions[0],
        "bottom_region_index": regions[1],
        "labels": torch.from_numpy(labels),
        "tumor_free_labels": torch.from_numpy(healthy),
    }


def monai_prediction(pair, batch, latents, labels=None):
    """What MONAI's UNet predicts, steered by label maps where given."""
    is_rflow = pair.version.startswith("rflow")
    common = {"x": latents, "timesteps": batch["timesteps"]}
    if is_rflow:
        common["class_labels"] = batch["class_labels"]
    inputs = {**common, "spacing_tensor": batch["spacing"]}
    if not is_rflow:
        inputs["top_region_index_tensor"] = batch["top_region_index"]
        inputs["bottom_region_index_tensor"] = batch["bottom_region_index"]
    if labels is not None:
        down, mid = pair.monai["controlnet"](**common, controlnet_cond=label_bits(labels))
        inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return pair.monai["unet"](**inputs)


def monai_noisy_latents_and_target(pair, batch):
    """The published training's input and target."""
    latents = batch["latents"] * SCALE_FACTOR
    noisy = make_scheduler(pair.version).add_noise(latents, batch["noise"], batch["timesteps"])
    return noisy, latents - batch["noise"] if pair.version.startswith("rflow") else batch["noise"]


def monai_controlnet_loss(pair, batch, is_weighted, contrast_weight):
    """The published losses, written out with `F.interpolate` and MONAI's `dilate`."""
    noisy, target = monai_noisy_latents_and_target(pair, batch)
    prediction = monai_prediction(pair, batch, noisy, batch["labels"])
    size = prediction.shape[2:]
    weights = torch.ones_like(prediction)
    if is_weighted:
        nearest = F.interpolate(batch["labels"].float(), size=size, mode="nearest").expand_as(prediction)
        for label in WEIGHTED_LABELS:
            weights[nearest == label] = WEIGHT
    loss = ((prediction - target).abs() * weights).mean()
    if not contrast_weight:
        return loss

    free = monai_prediction(pair, batch, noisy, batch["tumor_free_labels"])
    roi = (batch["labels"] != batch["tumor_free_labels"]).to(torch.uint8)
    background = 1 - dilate(roi, filter_size=3).to(torch.uint8)
    roi, background = (
        F.interpolate(mask, size=size, mode="nearest").expand_as(prediction).float() for mask in (roi, background)
    )
    apart = -((prediction - free).abs() * roi).sum() / (roi.sum() + 1e-5)
    apart = F.relu(apart + 2) - 2
    return loss + contrast_weight * (apart + ((free - target).abs() * background).sum() / (background.sum() + 1e-5))


@pytest.fixture
def networks(pair):
    """The UNet frozen on both sides, as the ControlNet's training has it; all as before afterwards."""
    pair.monai["unet"].requires_grad_(False)
    pair.pipe.unet.requires_grad_(False)
    yield
    for network in (pair.monai["unet"], pair.monai["controlnet"], pair.pipe.unet, pair.pipe.controlnet):
        network.zero_grad()
        network.requires_grad_(True)


def assert_same_step(loss: torch.Tensor, reference: torch.Tensor, network, reference_network) -> None:
    """Loss and gradients, none missing."""
    loss.backward()
    reference.backward()
    assert abs(loss.item() - reference.item()) <= TOLERANCE * max(1.0, abs(reference.item()))
    expected = {name: parameter.grad for name, parameter in reference_network.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    compared = 0
    for name, parameter in network.named_parameters():
        gradient = expected[unet_source_keys(name)[0]]
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            error = (parameter.grad - gradient).abs().max()
            assert error <= 5 * TOLERANCE * largest, f"{name}: {error:.2e} with a largest gradient of {largest:.2e}"
            compared += 1
    assert compared > 20


def controlnet_objective(pair, **losses) -> ControlNetObjective:
    pipe = pair.pipe
    networks = pipe.controlnet, pipe.controlnet.config, pipe.unet, pipe.unet.config
    return ControlNetObjective(*networks, pipe.scheduler, pipe.vae.config.scaling_factor, **losses)


@pytest.mark.parametrize("contrast_weight", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
def test_controlnet_step(pair, networks, batch, is_weighted, contrast_weight):
    objective = controlnet_objective(
        pair,
        weighted_labels=WEIGHTED_LABELS if is_weighted else (),
        weighted_loss=WEIGHT,
        region_contrastive_weight=contrast_weight,
    )
    with torch.enable_grad():
        loss = objective(batch)["loss"]
        reference = monai_controlnet_loss(pair, batch, is_weighted, contrast_weight)
        assert_same_step(loss, reference, pair.pipe.controlnet, pair.monai["controlnet"])


def test_gradient_checkpointing_gives_the_same_step(pair, networks, batch):
    for network in (pair.pipe.controlnet, pair.pipe.unet):
        network.enable_gradient_checkpointing()
    try:
        with torch.enable_grad():
            loss = controlnet_objective(pair, weighted_labels=WEIGHTED_LABELS, weighted_loss=WEIGHT)(batch)["loss"]
            reference = monai_controlnet_loss(pair, batch, is_weighted=True, contrast_weight=0.0)
            assert_same_step(loss, reference, pair.pipe.controlnet, pair.monai["controlnet"])
    finally:
        for network in (pair.pipe.controlnet, pair.pipe.unet):
            network.disable_gradient_checkpointing()


def test_unet_step(pair, batch):
    pipe = pair.pipe
    objective = DiffusionObjective(pipe.unet, pipe.unet.config, pipe.scheduler, pipe.vae.config.scaling_factor)
    with torch.enable_grad():
        noisy, target = monai_noisy_latents_and_target(pair, batch)
        reference = F.l1_loss(monai_prediction(pair, batch, noisy), target)
        assert_same_step(objective(batch)["loss"], reference, pipe.unet, pair.monai["unet"])
    pipe.unet.zero_grad()
    pair.monai["unet"].zero_grad()


MISTAKES = {
    "unscaled latents": lambda objective, batch: setattr(objective, "scaling_factor", 1.0),
    "weight on another label": lambda objective, batch: setattr(objective, "weighted_labels", (23, 1)),
    "no contrast": lambda objective, batch: setattr(objective, "region_contrastive_weight", 1e-9),
    "tumors not removed": lambda objective, batch: batch.update(tumor_free_labels=batch["labels"]),
    "noise of another case": lambda objective, batch: batch.update(noise=batch["noise"].flip(0)),
    "timesteps of another case": lambda objective, batch: batch.update(timesteps=batch["timesteps"].flip(0)),
    "spacing not a hundredfold": lambda objective, batch: batch.update(spacing=batch["spacing"] / 100),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(make_pair, mistake):
    pair = make_pair("rflow-ct", "two levels")
    batch = make_batch(pair)
    reference = monai_controlnet_loss(pair, batch, is_weighted=True, contrast_weight=1.0)
    objective = controlnet_objective(
        pair, weighted_labels=WEIGHTED_LABELS, weighted_loss=WEIGHT, region_contrastive_weight=1.0
    )
    assert abs(objective(batch)["loss"] - reference) <= TOLERANCE * abs(reference)
    MISTAKES[mistake](objective, batch)
    assert abs(objective(batch)["loss"] - reference) > 20 * TOLERANCE * abs(reference)
