"""The parity tests notice: each mistake that is easily made moves the output by far more than the tolerance."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import nn

from maisi_diffusers.loaders import maisi_checkpoint
from maisi_diffusers.models import (
    autoencoder_kl_maisi,
    unet_3d_blocks_maisi,
    upsample_conv_maisi,
    vae_blocks_maisi,
)
from maisi_diffusers.models.attention_maisi import MaisiAttention, MaisiAttnProcessor, MaisiTransformerBlock
from maisi_diffusers.pipelines import MaisiCTPipeline

from .monai_reference import VERSIONS
from .test_networks import TOLERANCE, controlnet_inputs, unet_inputs

NOTICED = 10 * TOLERANCE


@pytest.fixture
def pair(request, make_pair):
    return make_pair(request.param, "three levels")


def outputs(pair, name):
    """The same call of ours and of MONAI's."""
    ours, monai = getattr(pair.pipe, name.partition(" ")[0]), pair.monai[name.partition(" ")[0]]
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, *pair.size.latent, generator=generator)
    grid = tuple(4 * size for size in pair.size.latent)
    if name == "vae encoder":
        image = torch.rand(1, 1, *grid, generator=generator)
        posterior = ours.encode(image).latent_dist
        return torch.cat([posterior.mean, posterior.std]), torch.cat(monai.encode(image))
    if name in ("vae decoder", "mask_vae decoder"):
        return ours.decode(latent).sample, monai.decode(latent)
    if name == "unet":
        monai_inputs, inputs = unet_inputs(pair)
        return ours(**inputs).sample, monai(**monai_inputs)
    if name == "controlnet":
        monai_inputs, inputs = controlnet_inputs(pair)
        return ours(**inputs).mid_block_res_sample, monai(**monai_inputs)[1]
    if name == "unet with controlnet":
        monai_inputs, inputs = controlnet_inputs(pair)
        down, mid = ours_cn = pair.pipe.controlnet(**inputs, return_dict=False)
        monai_down, monai_mid = pair.monai["controlnet"](**monai_inputs)
        monai_inputs, inputs = unet_inputs(pair)
        names = ("down_block_additional_residuals", "mid_block_additional_residual")
        return (
            ours(**inputs, **dict(zip(names, ours_cn))).sample,
            monai(**monai_inputs, **dict(zip(names, (monai_down, monai_mid)))),
        )
    sizes = torch.rand(2, 1, 10, generator=generator)
    timesteps = torch.tensor([999, 250])
    return ours(latent, timesteps, encoder_hidden_states=sizes).sample, monai(latent, timesteps, context=sizes)


def deviation(pair, name):
    ours, monai = outputs(pair, name)
    if ours.shape != monai.shape:
        return float("inf")
    return ((ours - monai).abs().max() / monai.abs().max()).item()


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


# Each mistake is a function of the networks, which are a copy, and pytest's monkeypatch.


class Functional:
    """`torch.nn.functional` for one of our modules alone, with some functions replaced."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(F, name)


def align_corners(pipe, monkeypatch):
    def interpolate(x, scale_factor, mode, align_corners):
        return F.interpolate(x, scale_factor=scale_factor, mode=mode, align_corners=True)

    monkeypatch.setattr(vae_blocks_maisi, "F", Functional(interpolate=interpolate))


def nearest_in_vae(pipe, monkeypatch):
    def interpolate(x, scale_factor, mode, align_corners):
        return F.interpolate(x, scale_factor=scale_factor, mode="nearest")

    monkeypatch.setattr(vae_blocks_maisi, "F", Functional(interpolate=interpolate))


def symmetric_padding_in_vae(pipe, monkeypatch):
    monkeypatch.setattr(vae_blocks_maisi, "F", Functional(pad=lambda x, padding: F.pad(x, (1, 0) * 3)))


def activation_before_the_last_convolution(pipe, monkeypatch):
    for coder in (pipe.vae.encoder, pipe.vae.decoder):
        coder.conv_norm_out = nn.Sequential(coder.conv_norm_out, nn.SiLU())


def output_padding_before(pipe, monkeypatch):
    for module in modules(pipe.mask_vae, nn.ConvTranspose3d):
        original = module.forward
        module.forward = lambda x, original=original: original(x.flip(2)).flip(2)


def trilinear_in_unet(pipe, monkeypatch):
    def interpolate(x, scale_factor, mode):
        return F.interpolate(x, scale_factor=scale_factor, mode="trilinear")

    def upsample_and_convolve(hidden_states, conv):
        return conv(interpolate(hidden_states, 2.0, "trilinear"))

    monkeypatch.setattr(unet_3d_blocks_maisi, "F", Functional(interpolate=interpolate))
    monkeypatch.setattr(unet_3d_blocks_maisi, "upsample_and_convolve", upsample_and_convolve)


def kernel_after_doubling_not_mirrored(pipe, monkeypatch):
    def conv_transpose3d(x, kernel, *args, **kwargs):
        return F.conv_transpose3d(x, kernel.flip(2, 3, 4), *args, **kwargs)

    monkeypatch.setattr(upsample_conv_maisi, "VOXELS_PER_CHANNEL", 0)
    monkeypatch.setattr(upsample_conv_maisi, "F", Functional(conv_transpose3d=conv_transpose3d))


def one_sided_padding_in_unet(pipe, monkeypatch):
    for module in modules(pipe.unet, unet_3d_blocks_maisi.MaisiDownsample3D):
        module.conv.padding = (0, 0, 0)
        module.conv = nn.Sequential(nn.ConstantPad3d((0, 1) * 3, 0.0), module.conv)


def pooling_before_the_norm(pipe, monkeypatch):
    for module in modules(pipe.unet, unet_3d_blocks_maisi.MaisiResnetBlock3D):
        if module.resample == "down":
            original = module.forward
            module.resample = None
            module.forward = lambda x, temb, original=original: original(F.avg_pool3d(x, 2), temb)


def one_sided_padding_in_condition_embedding(pipe, monkeypatch):
    for module in pipe.controlnet.controlnet_cond_embedding.blocks:
        if module.stride[0] == 2:
            module.forward = lambda x, m=module: F.conv3d(F.pad(x, (0, 1) * 3), m.weight, m.bias, stride=2)


def sine_before_cosine(pipe, monkeypatch):
    for model in (pipe.unet, pipe.controlnet, pipe.mask_unet):
        model.time_proj.flip_sin_to_cos = False


def frequencies_to_the_last(pipe, monkeypatch):
    for model in (pipe.unet, pipe.controlnet, pipe.mask_unet):
        model.time_proj.downscale_freq_shift = 1


def embeddings_in_another_order(pipe, monkeypatch):
    original = pipe.unet.get_embedding
    pipe.unet.get_embedding = lambda *args: original(*args).roll(4 * 64, 1)


def no_class_embedding(pipe, monkeypatch):
    pipe.unet.class_embedding.weight.data.zero_()


def regions_swapped(pipe, monkeypatch):
    unet = pipe.unet
    unet.top_region_embedding, unet.bottom_region_embedding = unet.bottom_region_embedding, unet.top_region_embedding


def interleaved_heads(pipe, monkeypatch):
    original = MaisiAttnProcessor.__call__

    def call(self, attn, hidden_states, encoder_hidden_states=None):
        # channels of a head apart by the number of heads
        order = torch.arange(attn.to_q.out_features).view(-1, attn.heads).T.flatten()
        shuffled = copy.deepcopy(attn)
        for layer in (shuffled.to_q, shuffled.to_k, shuffled.to_v):
            layer.weight.data = layer.weight.data[order]
            if layer.bias is not None:
                layer.bias.data = layer.bias.data[order]
        return original(self, shuffled, hidden_states, encoder_hidden_states)

    monkeypatch.setattr(MaisiAttnProcessor, "__call__", call)


def no_attention_bias(pipe, monkeypatch):
    for module in modules(pipe.unet, MaisiAttention):
        module.to_v.bias = None


def gate_first(pipe, monkeypatch):
    for block in modules(pipe.mask_unet, GEGLU):
        half = block.proj.out_features // 2
        block.proj.weight.data = block.proj.weight.data.roll(half, 0)
        block.proj.bias.data = block.proj.bias.data.roll(half, 0)


def no_cross_attention(pipe, monkeypatch):
    for block in modules(pipe.mask_unet, MaisiTransformerBlock):
        block.attn2.forward = lambda x, context: torch.zeros_like(x)


def last_residual_not_in_the_middle(pipe, monkeypatch):
    pipe.unet.register_to_config(cross_attention_dim=0)


def log_sigma_as_it_is_called(pipe, monkeypatch):
    original = autoencoder_kl_maisi.DiagonalGaussianDistribution

    def distribution(moments):
        mean, log_sigma = moments.chunk(2, dim=1)
        return original(torch.cat([mean, 2 * log_sigma], dim=1))

    monkeypatch.setattr(autoencoder_kl_maisi, "DiagonalGaussianDistribution", distribution)


# The version is named where only one has the part.
MISTAKES = [
    (align_corners, "vae decoder"),
    (nearest_in_vae, "vae decoder"),
    (symmetric_padding_in_vae, "vae encoder"),
    (activation_before_the_last_convolution, "vae encoder"),
    (activation_before_the_last_convolution, "vae decoder"),
    (log_sigma_as_it_is_called, "vae encoder"),
    (output_padding_before, "mask_vae decoder"),
    (trilinear_in_unet, "unet"),
    (kernel_after_doubling_not_mirrored, "unet"),
    (one_sided_padding_in_unet, "unet", "ddpm-ct"),
    (pooling_before_the_norm, "unet", "rflow-ct"),
    (one_sided_padding_in_condition_embedding, "controlnet"),
    (sine_before_cosine, "unet"),
    (sine_before_cosine, "controlnet"),
    (frequencies_to_the_last, "unet"),
    (embeddings_in_another_order, "unet"),
    (no_class_embedding, "unet", "rflow-ct"),
    (regions_swapped, "unet", "ddpm-ct"),
    (interleaved_heads, "unet"),
    (interleaved_heads, "mask_unet"),
    (no_attention_bias, "unet"),
    (gate_first, "mask_unet"),
    (no_cross_attention, "mask_unet"),
    (last_residual_not_in_the_middle, "unet with controlnet"),
]
CASES = [
    pytest.param(version, mistake, call, id=f"{version}-{mistake.__name__}-{call}")
    for mistake, call, *versions in MISTAKES
    for version in versions or VERSIONS
]


@pytest.mark.parametrize(("pair", "mistake", "call"), CASES, indirect=["pair"])
def test_mistake_is_noticed(pair, mistake, call, monkeypatch):
    wrong = copy.copy(pair)
    wrong.pipe = SimpleNamespace(**copy.deepcopy(pair.pipe.components))
    for vae in (wrong.pipe.vae, wrong.pipe.mask_vae):
        vae.disable_tiling()  # which calls the layers that mistakes are made in
    assert deviation(wrong, call) <= TOLERANCE
    mistake(wrong.pipe, monkeypatch)
    assert deviation(wrong, call) > NOTICED


# A norm, another epsilon for it, and the layer before it by our name and by MONAI's.
EPSILONS = [
    ("unet", nn.GroupNorm, 1e-5, "conv_in", "conv_in"),
    ("vae decoder", nn.GroupNorm, 1e-5, "decoder.conv_in", "decoder.blocks.0."),
    ("mask_unet", nn.LayerNorm, 1e-6, "proj_in", "proj_in"),
]


@pytest.mark.parametrize("pair", VERSIONS, indirect=True)
@pytest.mark.parametrize(("call", "norm", "eps", "own", "monai"), EPSILONS, ids=[call for call, *_ in EPSILONS])
def test_another_epsilon_is_noticed(pair, call, norm, eps, own, monai):
    """The usual one of the other kind of norm; it shows where the input hardly varies."""
    quiet = copy.copy(pair)
    quiet.monai = copy.deepcopy(pair.monai)
    quiet.pipe = SimpleNamespace(**copy.deepcopy(pair.pipe.components))
    name = call.partition(" ")[0]
    network = getattr(quiet.pipe, name)
    for part, model in ((own, network), (monai, quiet.monai[name])):
        for key, parameter in model.named_parameters():
            if part in key:
                parameter.data *= 1e-3
    assert deviation(quiet, call) <= TOLERANCE
    for module in modules(network, norm):
        module.eps = eps
    assert deviation(quiet, call) > NOTICED


MID = "mid_block.attentions.0"
UP = "decoder.up_blocks.0.resnets.0"
SWAPS = [
    ("unet", "down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.1.norm1.weight"),
    ("unet", f"{MID}.attn.to_q.weight", f"{MID}.attn.to_k.weight"),
    ("unet", "mid_block.resnets.0.conv1.weight", "mid_block.resnets.1.conv1.weight"),
    ("unet", "mid_block.resnets.0.norm1.bias", "mid_block.resnets.0.norm2.bias"),
    ("controlnet", "mid_block.resnets.0.conv2.bias", "mid_block.resnets.1.conv2.bias"),
    ("mask_unet", f"{MID}.transformer_blocks.0.norm1.weight", f"{MID}.transformer_blocks.0.norm3.weight"),
    ("vae encoder", "quant_conv.weight", "quant_conv.weight"),
    ("vae decoder", f"{UP}.norm1.bias", f"{UP}.norm2.bias"),
    ("mask_vae decoder", f"{UP}.conv1.weight", f"{UP}.conv2.weight"),
]


@pytest.mark.parametrize("pair", VERSIONS, indirect=True)
@pytest.mark.parametrize(("call", "one", "other"), SWAPS, ids=[f"{swap[0]}-{swap[1]}" for swap in SWAPS])
def test_swapped_weights_are_noticed(pair, call, one, other, monkeypatch):
    function = "vae_source_keys" if "vae" in call else "unet_source_keys"
    original = getattr(maisi_checkpoint, function)

    def swapped(name, *args):
        keys = original({one: other, other: one}.get(name, name), *args)
        return keys[::-1] if name == one == other else keys  # mean and log-variance

    monkeypatch.setattr(maisi_checkpoint, function, swapped)
    wrong = copy.copy(pair)
    wrong.pipe = MaisiCTPipeline.from_maisi_checkpoint(pair.folder, version=pair.version)
    assert deviation(pair, call) <= TOLERANCE
    assert deviation(wrong, call) > NOTICED
