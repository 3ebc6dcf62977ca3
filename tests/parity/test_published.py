"""The full published architecture on one small input."""

from types import SimpleNamespace

import pytest
import torch

from maisi_diffusers import AutoencoderKLMaisi, MaisiControlNetModel, MaisiUNet3DConditionModel
from maisi_diffusers.loaders.architecture import RELEASED
from maisi_diffusers.loaders.key_mapping import unet_source_keys, vae_source_keys

from .monai_reference import PUBLISHED, build_networks
from .test_networks import assert_close, controlnet_inputs, unet_inputs


def converted(model, network, source_keys):
    """Our model with the weights of MONAI's; the loader's own way is tested with small networks."""
    weights = network.state_dict()
    filled = {name: torch.cat([weights[key] for key in source_keys(name)]) for name in model.state_dict()}
    model.load_state_dict(filled)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["rflow-ct", "ddpm-ct"])
def test_published_architecture(version):
    released = RELEASED[version.removesuffix("-ct")]
    monai = build_networks(version, PUBLISHED)
    vae = converted(AutoencoderKLMaisi(**released["vae"]), monai["vae"], lambda name: vae_source_keys(name, (2, 2, 2)))
    image = torch.rand(1, 1, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    mean, std = monai["vae"].encode(image)
    posterior = vae.encode(image).latent_dist
    assert_close(posterior.mean, mean)
    assert_close(posterior.std, std)
    assert_close(vae.decode(mean).sample, monai["vae"].decode(mean))

    mask_vae = converted(
        AutoencoderKLMaisi(**released["mask_vae"]), monai["mask_vae"], lambda name: vae_source_keys(name, (1, 2, 2))
    )
    assert_close(mask_vae.decode(mean).sample, monai["mask_vae"].decode(mean))

    inputs = SimpleNamespace(version=version, size=PUBLISHED)
    controlnet = converted(MaisiControlNetModel(**released["controlnet"]), monai["controlnet"], unet_source_keys)
    theirs, ours = controlnet_inputs(inputs)
    down, mid = monai["controlnet"](**theirs)
    own_down, own_mid = controlnet(**ours, return_dict=False)
    assert_close(own_mid, mid)

    unet = converted(MaisiUNet3DConditionModel(**released["unet"]), monai["unet"], unet_source_keys)
    theirs, ours = unet_inputs(inputs)
    names = ("down_block_additional_residuals", "mid_block_additional_residual")
    reference = monai["unet"](**theirs, **dict(zip(names, (down, mid))))
    assert_close(unet(**ours, **dict(zip(names, (own_down, own_mid)))).sample, reference)

    mask_unet = converted(MaisiUNet3DConditionModel(**released["mask_unet"]), monai["mask_unet"], unet_source_keys)
    sizes = torch.rand(2, 1, 10, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([999, 250])
    reference = monai["mask_unet"](x=theirs["x"], timesteps=timesteps, context=sizes)
    assert_close(mask_unet(ours["sample"], timesteps, encoder_hidden_states=sizes).sample, reference)
