"""What a training step computes: what is predicted from what, by whom, and what it keeps in memory."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler

from maisi_diffusers import MaisiRFlowScheduler
from maisi_diffusers.training.losses import label_weights, region_contrastive_loss, weighted_error
from maisi_diffusers.training.objectives import (
    ControlNetObjective,
    DiffusionObjective,
    noisy_latents_and_target,
    unet_conditions,
)
from tests.tiny import SIZE, make_pipeline, seeded

FACTOR = 1.3


def make_batch(size=2):
    draws = torch.randn(2, size, 4, *(n // 4 for n in SIZE), generator=seeded())
    labels = torch.full((size, 1, *SIZE), 200, dtype=torch.uint8)
    labels[:, :, 8:16, 4:12, 8:20] = 1
    batch = {
        "latents": draws[0],
        "noise": draws[1],
        "timesteps": torch.linspace(200.0, 700.0, size),
        "class_labels": torch.full((size,), 1),
        "spacing": torch.full((size, 3), 200.0),
        "top_region_index": torch.tensor([[0, 100.0, 0, 0]] * size),
        "bottom_region_index": torch.tensor([[0, 0, 0, 100.0]] * size),
        "tumor_free_labels": labels.clone(),
    }
    labels[:, :, 9:13, 5:9, 10:16] = 129
    return batch | {"labels": labels}


@pytest.fixture(scope="module")
def pipe():
    pipe = make_pipeline(with_mask_networks=False)
    pipe.unet.requires_grad_(False)
    return pipe


def make_objective(pipe, **kwargs):
    return ControlNetObjective(
        pipe.controlnet, pipe.controlnet.config, pipe.unet, pipe.unet.config, pipe.scheduler, FACTOR, **kwargs
    )


def test_what_rectified_flow_learns():
    batch = make_batch()
    noisy, target = noisy_latents_and_target(batch, MaisiRFlowScheduler(), FACTOR)
    t = (batch["timesteps"] / 1000).view(-1, 1, 1, 1, 1)
    assert torch.allclose(noisy, (1 - t) * FACTOR * batch["latents"] + t * batch["noise"])
    assert torch.equal(target, FACTOR * batch["latents"] - batch["noise"])
    assert noisy.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_what_ddpm_learns(prediction_type):
    batch = make_batch() | {"timesteps": torch.tensor([20, 700])}
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    noisy, target = noisy_latents_and_target(batch, scheduler, FACTOR)
    share = scheduler.alphas_cumprod[batch["timesteps"]].sqrt().view(-1, 1, 1, 1, 1)
    latents, noise = FACTOR * batch["latents"], batch["noise"]
    rest = (1 - share**2).sqrt()
    assert torch.allclose(noisy, share * latents + rest * noise, atol=1e-6)
    expected = {"epsilon": noise, "sample": latents, "v_prediction": share * noise - rest * latents}
    assert torch.allclose(target, expected[prediction_type], atol=1e-6)


@pytest.mark.parametrize(
    ("version", "taken"),
    [("rflow-ct", {"class_labels", "spacing"}), ("ddpm-ct", {"spacing", "top_region_index", "bottom_region_index"})],
)
def test_conditions(version, taken):
    pipe, batch = make_pipeline(version, with_mask_networks=False), make_batch()
    conditions = unet_conditions(batch, pipe.unet.config)
    assert conditions.keys() == taken
    batch["timesteps"] = torch.tensor([20, 700])
    noisy, target = noisy_latents_and_target(batch, pipe.scheduler, FACTOR)
    expected = (pipe.unet(noisy, batch["timesteps"], **conditions).sample - target).abs().mean()
    assert torch.equal(
        DiffusionObjective(pipe.unet, pipe.unet.config, pipe.scheduler, FACTOR)(batch)["loss"], expected
    )
    assert torch.isfinite(make_objective(pipe)(batch)["loss"])


def test_conditions_of_a_mask_unet():
    """Anatomy sizes alone, which a batch of images need not have."""
    unet, batch = make_pipeline().mask_unet, make_batch()
    sizes = torch.tensor([0.5, -1.0] * 5).expand(2, 1, 10)
    assert unet_conditions(batch | {"encoder_hidden_states": sizes}, unet.config).keys() == {"encoder_hidden_states"}
    objective = DiffusionObjective(unet, unet.config, MaisiRFlowScheduler(), FACTOR)
    losses = [objective(batch | {"encoder_hidden_states": given})["loss"] for given in (sizes, -sizes)]
    assert losses[0].isfinite() and losses[0] != losses[1]


def test_weights(pipe):
    batch = make_batch()
    noisy, target = noisy_latents_and_target(batch, pipe.scheduler, FACTOR)
    prediction = make_objective(pipe).predict(batch, noisy, batch["labels"])
    weights = label_weights(batch["labels"], [129], 100.0, 4)
    assert weights.max() == 100
    loss = make_objective(pipe, weighted_labels=(129,), weighted_loss=100.0)(batch)["loss"]
    assert torch.equal(loss, weighted_error(prediction, target, weights))
    plain = weighted_error(prediction, target)
    assert torch.equal(make_objective(pipe)(batch)["loss"], plain) and loss > 1.5 * plain
    assert torch.equal(make_objective(pipe, weighted_labels=(129,))(batch)["loss"], plain)


def test_weights_without_steering(pipe):
    batch = make_batch()
    noisy, target = noisy_latents_and_target(batch, pipe.scheduler, FACTOR)
    prediction = pipe.unet(noisy, batch["timesteps"], **unet_conditions(batch, pipe.unet.config)).sample
    make = partial(DiffusionObjective, pipe.unet, pipe.unet.config, pipe.scheduler, FACTOR)
    weights = label_weights(batch["labels"], [129], 100.0, 4)
    loss = make(weighted_labels=(129,), weighted_loss=100.0)(batch)["loss"]
    assert torch.equal(loss, weighted_error(prediction, target, weights)) and weights.max() == 100
    del batch["labels"]
    assert torch.equal(make(weighted_labels=(129,))(batch)["loss"], weighted_error(prediction, target))


def test_loss_type(pipe):
    batch = make_batch()
    noisy, target = noisy_latents_and_target(batch, pipe.scheduler, FACTOR)
    steered = make_objective(pipe).predict(batch, noisy, batch["labels"])
    assert torch.equal(
        make_objective(pipe, loss_type="l2")(batch)["loss"], weighted_error(steered, target, None, "l2")
    )
    losses = [
        DiffusionObjective(pipe.unet, pipe.unet.config, pipe.scheduler, FACTOR, loss_type)(batch)["loss"]
        for loss_type in ("l1", "l2")
    ]
    conditions = unet_conditions(batch, pipe.unet.config)
    error = pipe.unet(noisy, batch["timesteps"], **conditions).sample - target
    assert torch.allclose(torch.stack(losses), torch.stack([error.abs().mean(), error.square().mean()]))


def test_region_contrastive_loss(pipe):
    """One pass over both label maps gives what two passes give."""
    batch = make_batch()
    labels, tumor_free_labels = batch["labels"], batch["tumor_free_labels"]
    objective = make_objective(pipe, region_contrastive_weight=0.5)
    losses = objective(batch)
    noisy, target = noisy_latents_and_target(batch, pipe.scheduler, FACTOR)
    prediction, tumor_free = (objective.predict(batch, noisy, maps) for maps in (labels, tumor_free_labels))
    contrast = region_contrastive_loss(prediction, tumor_free, target, labels, tumor_free_labels, 4)
    assert losses.keys() == {"loss", "reconstruction_loss", "region_contrastive_loss"}
    assert torch.allclose(losses["region_contrastive_loss"], contrast, rtol=1e-5)
    assert torch.allclose(losses["reconstruction_loss"], weighted_error(prediction, target), rtol=1e-5)
    assert torch.equal(losses["loss"], losses["reconstruction_loss"] + 0.5 * losses["region_contrastive_loss"])


def test_half_precision_unet(pipe):
    """The frozen UNet may compute in half precision; the ControlNet stays in float32, and so do its gradients."""
    batch = make_batch(1)
    half = make_pipeline(with_mask_networks=False)
    half.unet.requires_grad_(False).to(torch.bfloat16)
    loss, expected = (make_objective(one)(batch)["loss"] for one in (half, pipe))
    assert loss.dtype == torch.float32 and loss != expected and torch.allclose(loss, expected, rtol=0.02)
    loss.backward()
    gradients = [parameter.grad for parameter in half.controlnet.parameters()]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@contextmanager
def saved_by_the_encoder(unet):
    """Sizes of the tensors that are kept for the backward pass, by the UNet's encoder and by all after it."""
    saved = {True: [], False: []}
    is_encoder = False

    def enter(module, args):
        nonlocal is_encoder
        is_encoder = True

    def leave(module, args, output):
        nonlocal is_encoder
        is_encoder = False

    def pack(tensor):
        saved[is_encoder].append(tensor.numel())
        return tensor

    encoder = [unet.time_embedding, unet.spacing_embedding, unet.conv_in, *unet.down_blocks]
    handles = [module.register_forward_pre_hook(enter) for module in encoder]
    handles += [module.register_forward_hook(leave) for module in encoder]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_frozen_unet(pipe, weight):
    """It keeps no activations of its encoder and makes no gradients of its weights; the ControlNet gets all of its."""
    pipe.controlnet.zero_grad(set_to_none=True)
    objective, batch = make_objective(pipe, region_contrastive_weight=weight), make_batch()
    with saved_by_the_encoder(pipe.unet) as saved:
        loss = objective(batch)["loss"]
    assert not saved[True] and sum(saved[False]) > 1e6
    loss.backward()
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    assert all(parameter.grad.any() for parameter in pipe.controlnet.parameters())


def test_trained_unet_keeps_its_encoder(pipe):
    """What the test above would see if the UNet were not frozen."""
    pipe.unet.requires_grad_(True)
    with saved_by_the_encoder(pipe.unet) as saved:
        DiffusionObjective(pipe.unet, pipe.unet.config, pipe.scheduler, FACTOR)(make_batch())
    pipe.unet.requires_grad_(False)
    assert sum(saved[True]) > 1e6
