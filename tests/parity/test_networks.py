"""Every network call equals MONAI's, to float32 rounding."""

import pytest
import torch
import torch.nn.functional as F

from maisi_diffusers.loaders.key_mapping import unet_source_keys
from maisi_diffusers.models import TILINGS, upsample_conv_maisi

from .monai_reference import label_bits

# Float32 rounding alone is about 3e-6 of the largest value.
TOLERANCE = 2e-5


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == reference.shape
    difference = (ours - reference).abs().max() / reference.abs().max()
    assert difference <= tolerance, f"{difference:.2e} of the largest value"


def unet_inputs(pair, seed=0, batch=2):
    """The same inputs by MONAI's names and by ours."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 4, *pair.size.latent, generator=generator)
    timesteps = torch.tensor([871.25, 13.0])[:batch]
    spacing = torch.tensor([[0.75, 0.75, 2.5], [1.5, 1.5, 1.0]])[:batch] * 100
    monai = {"x": sample, "timesteps": timesteps, "spacing_tensor": spacing}
    ours = {"sample": sample, "timestep": timesteps, "spacing": spacing}
    if pair.version == "rflow-ct":
        monai["class_labels"] = ours["class_labels"] = torch.tensor([1, 9])[:batch]
    else:
        top, bottom = torch.eye(4)[[1, 0]][:batch] * 100, torch.eye(4)[[2, 3]][:batch] * 100
        monai |= {"top_region_index_tensor": top, "bottom_region_index_tensor": bottom}
        ours |= {"top_region_index": top, "bottom_region_index": bottom}
    return monai, ours


def controlnet_inputs(pair, seed=0):
    monai, ours = unet_inputs(pair, seed)
    generator = torch.Generator().manual_seed(seed)
    grid = tuple(4 * size for size in pair.size.latent)
    condition = label_bits(torch.randint(0, 256, (2, 1, *grid), generator=generator))
    names = {"x", "sample", "timesteps", "timestep", "class_labels"}
    return tuple(
        {k: v for k, v in inputs.items() if k in names} | {"controlnet_cond": condition} for inputs in (monai, ours)
    )


@pytest.fixture(params=["off", "exact", "lean"])
def tiling(request, pair):
    """The VAEs in one piece and in slabs, which have convolutions and norms of their own."""
    vaes = (pair.pipe.vae, pair.pipe.mask_vae)
    for vae in vaes:
        TILINGS[request.param](vae)
    yield
    for vae in vaes:
        vae.enable_auto_tiling()


def test_vae_encode(pair, tiling):
    image = torch.rand(2, 1, *(4 * size for size in pair.size.latent), generator=torch.Generator().manual_seed(1))
    mean, std = pair.monai["vae"].encode(image)
    posterior = pair.pipe.vae.encode(image).latent_dist
    assert_close(posterior.mean, mean)
    assert_close(posterior.std, std)


def test_vae_decode(pair, tiling):
    latent = torch.randn(2, 4, *pair.size.latent, generator=torch.Generator().manual_seed(2))
    assert_close(pair.pipe.vae.decode(latent).sample, pair.monai["vae"].decode(latent))


def test_mask_vae(pair, tiling):
    bits = label_bits(torch.randint(0, 256, (1, 1, *(4 * size for size in pair.size.latent))))
    mean, std = pair.monai["mask_vae"].encode(bits)
    posterior = pair.pipe.mask_vae.encode(bits).latent_dist
    assert_close(posterior.mean, mean)
    assert_close(posterior.std, std)
    assert_close(pair.pipe.mask_vae.decode(mean).sample, pair.monai["mask_vae"].decode(mean))


# Where upsampling is computed on the grid as it was: on larger grids than these alone, or everywhere.
@pytest.mark.parametrize("voxels_per_channel", [upsample_conv_maisi.VOXELS_PER_CHANNEL, 0])
def test_unet(pair, monkeypatch, voxels_per_channel):
    monkeypatch.setattr(upsample_conv_maisi, "VOXELS_PER_CHANNEL", voxels_per_channel)
    monai, ours = unet_inputs(pair)
    assert_close(pair.pipe.unet(**ours).sample, pair.monai["unet"](**monai))


def test_controlnet(pair):
    monai, ours = controlnet_inputs(pair)
    down, mid = pair.monai["controlnet"](**monai, conditioning_scale=0.7)
    output = pair.pipe.controlnet(**ours, conditioning_scale=0.7)
    assert len(output.down_block_res_samples) == len(down)
    for own, reference in zip(output.down_block_res_samples, down):
        assert_close(own, reference)
    assert_close(output.mid_block_res_sample, mid)

    embedding = pair.pipe.controlnet.embed_condition(ours.pop("controlnet_cond"))
    again = pair.pipe.controlnet(**ours, controlnet_cond_embedding=embedding, conditioning_scale=0.7)
    assert torch.equal(again.mid_block_res_sample, output.mid_block_res_sample)


def test_unet_with_controlnet(pair):
    monai_cn, ours_cn = controlnet_inputs(pair)
    monai, ours = unet_inputs(pair)
    down, mid = pair.monai["controlnet"](**monai_cn)
    own_down, own_mid = pair.pipe.controlnet(**ours_cn, return_dict=False)
    reference = pair.monai["unet"](**monai, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    output = pair.pipe.unet(**ours, down_block_additional_residuals=own_down, mid_block_additional_residual=own_mid)
    assert_close(output.sample, reference)


def test_mask_unet(pair):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, *pair.size.latent, generator=generator)
    timesteps = torch.tensor([999, 250])
    sizes = torch.rand(2, 1, 10, generator=generator)
    reference = pair.monai["mask_unet"](x=sample, timesteps=timesteps, context=sizes)
    assert_close(pair.pipe.mask_unet(sample, timesteps, encoder_hidden_states=sizes).sample, reference)

    # Its class does not let the residual of the last skip reach the middle block.
    shapes = []
    hook = lambda module, args, output: shapes.extend(s.shape for s in output[1])  # noqa: E731
    handles = [block.register_forward_hook(hook) for block in pair.pipe.mask_unet.down_blocks]
    first = pair.pipe.mask_unet.conv_in(sample)
    pair.pipe.mask_unet(sample, timesteps, encoder_hidden_states=sizes)
    for handle in handles:
        handle.remove()
    residuals = [torch.randn(shape, generator=generator) for shape in (first.shape, *shapes)]
    reference = pair.monai["mask_unet"](
        x=sample, timesteps=timesteps, context=sizes, down_block_additional_residuals=residuals
    )
    output = pair.pipe.mask_unet(
        sample, timesteps, encoder_hidden_states=sizes, down_block_additional_residuals=residuals
    )
    assert_close(output.sample, reference)


def assert_gradients_close(network, reference_network, dtype: torch.dtype) -> None:
    """
    In float32 the rounding of the network's largest gradient hides what is small; in float64 every gradient counts, to
    the float32 that the sinusoids of the timestep are computed in on both sides.
    """
    references = {name: parameter.grad for name, parameter in reference_network.named_parameters()}
    largest = max(grad.abs().max() for grad in references.values() if grad is not None)
    for name, parameter in network.named_parameters():
        reference = references[unet_source_keys(name)[0]]
        assert (parameter.grad is None) == (reference is None), name
        if reference is not None:
            bound = TOLERANCE * largest if dtype == torch.float32 else 1e-6 * reference.abs().max() + 1e-8 * largest
            difference = (parameter.grad - reference).abs().max()
            assert difference <= bound, f"{name}: {difference:.2e} with a largest gradient of {largest:.2e}"


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def training(pair, request):
    """UNet and ControlNet of both sides in a dtype, and their inputs."""
    networks = [pair.monai["unet"], pair.monai["controlnet"], pair.pipe.unet, pair.pipe.controlnet]
    for network in networks:
        torch.nn.Module.to(network, request.param)
    cast = lambda inputs: {  # noqa: E731
        key: value if key == "class_labels" or key.startswith("timestep") else value.to(request.param)
        for key, value in inputs.items()
    }
    monai, ours = map(cast, unet_inputs(pair, seed=5))
    monai_cn, ours_cn = map(cast, controlnet_inputs(pair, seed=5))
    with torch.enable_grad():
        yield request.param, monai, ours, monai_cn, ours_cn
    for network in networks:
        network.zero_grad()
        network.requires_grad_(True)
        torch.nn.Module.to(network, torch.float32)


def target_of(output: torch.Tensor) -> torch.Tensor:
    """Off the output by 0.1 at least: L1 jumps where they meet, and there rounding alone would change a gradient."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(6)).to(output.dtype)
    return output.detach() + noise + 0.1 * noise.sign()


def test_unet_training_step(pair, training):
    """L1 between prediction and target, as in the published training of the diffusion model."""
    dtype, monai, ours, _, _ = training
    output = pair.monai["unet"](**monai)
    target = target_of(output)
    reference = F.l1_loss(output, target)
    reference.backward()
    loss = F.l1_loss(pair.pipe.unet(**ours, return_dict=False)[0], target)
    loss.backward()
    assert_close(loss, reference)
    assert_gradients_close(pair.pipe.unet, pair.monai["unet"], dtype)


def test_controlnet_training_step(pair, training):
    """L1 through the frozen UNet, as in the published training of the ControlNet."""
    dtype, monai, ours, monai_cn, ours_cn = training
    pair.monai["unet"].requires_grad_(False)
    pair.pipe.unet.requires_grad_(False)
    down, mid = pair.monai["controlnet"](**monai_cn)
    output = pair.monai["unet"](**monai, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    target = target_of(output)
    reference = F.l1_loss(output, target)
    reference.backward()
    down, mid = pair.pipe.controlnet(**ours_cn, return_dict=False)
    output = pair.pipe.unet(
        **ours, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
    )[0]
    loss = F.l1_loss(output, target)
    loss.backward()
    assert_close(loss, reference)
    assert_gradients_close(pair.pipe.controlnet, pair.monai["controlnet"], dtype)


def test_gradient_checkpointing_changes_nothing(pair):
    monai_cn, ours_cn = controlnet_inputs(pair)
    _, ours = unet_inputs(pair)
    unet, controlnet = pair.pipe.unet, pair.pipe.controlnet

    def gradient():
        down, mid = controlnet(**ours_cn, return_dict=False)
        output = unet(
            **ours, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )[0]
        (grad,) = torch.autograd.grad(output.square().mean(), [controlnet.conv_in.weight])
        return grad

    with torch.enable_grad():
        plain = gradient()
        unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
        recomputed = gradient()
    unet.disable_gradient_checkpointing()
    controlnet.disable_gradient_checkpointing()
    assert torch.equal(plain, recomputed)
