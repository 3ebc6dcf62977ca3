"""A ControlNet that begins with the latents that its labels' mean intensities stand for."""

import pytest
import torch

from maisi_diffusers import MaisiControlNetModel
from maisi_diffusers.anatomy import label_bits
from maisi_diffusers.training import linear_condition
from maisi_diffusers.training.linear_condition import LabelledLatent, cubes_of, fit_bits, make_linear_condition

CHANNELS = 6
INTENSITIES = {0: 0.0, 1: 0.52, 22: 0.55, 28: 0.15, 33: 0.75, 200: 0.45}


@pytest.fixture(autouse=True)
def short_fit(monkeypatch):
    monkeypatch.setattr(linear_condition, "RESTARTS", 4)
    monkeypatch.setattr(linear_condition, "FIT_STEPS", 1000)


def make_controlnet(channels, width=32, latent_channels=CHANNELS):
    torch.manual_seed(0)
    return MaisiControlNetModel(
        in_channels=latent_channels,
        block_out_channels=(width, width),
        layers_per_block=1,
        attention_levels=(False, True),
        norm_num_groups=8,
        conditioning_embedding_out_channels=channels,
    ).eval()


def make_cases(ratio):
    """Latents that are linear in the intensities of the cubes that they stand for."""
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(256)
    for label, intensity in INTENSITIES.items():
        table[label] = intensity
    factors = torch.randn(CHANNELS, ratio**3, generator=generator) / ratio
    cases = []
    for _ in range(3):
        size = (8, 16, 12)
        labels = torch.tensor(list(INTENSITIES))[torch.randint(len(INTENSITIES), (1, *size), generator=generator)]
        image = table[labels.long()]
        latent = (cubes_of(image, ratio) @ factors.T + 0.3).T.reshape(CHANNELS, *(n // ratio for n in size))
        cases.append(LabelledLatent(image, labels.to(torch.uint8), latent))
    return cases


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 12), (10, 24, 64)], ids=str)
@torch.no_grad()
def test_embedding_holds_the_latents(channels):
    controlnet, cases = make_controlnet(channels), make_cases(2 ** (len(channels) - 1))
    assert make_linear_condition(controlnet, cases) < 0.002
    directions, strengths, _ = torch.linalg.svd(controlnet.conv_in.weight.flatten(1))
    for case in cases:
        embedding = controlnet.embed_condition(label_bits(case.labels[None]))[0]
        along = torch.einsum("fc,fxyz->cxyz", directions, embedding) / strengths.square().mean().sqrt()
        least_used = along.flip(0)[:CHANNELS]
        assert (least_used - case.latent).abs().max() < 0.03 * case.latent.abs().max()
        assert along.flip(0)[CHANNELS:].abs().max() < 1e-5


def test_all_of_it_learns():
    """No gradient is lost in what does nothing yet."""
    controlnet, cases = make_controlnet((8, 32, 64)), make_cases(4)
    make_linear_condition(controlnet, cases)
    embedding = controlnet.embed_condition(label_bits(cases[0].labels[None]))
    (embedding - 1).square().sum().backward()
    for name, parameter in controlnet.controlnet_cond_embedding.named_parameters():
        assert parameter.grad.any(), name


def test_many_labels():
    """A hundred labels of random intensities: nearer than their mean is."""
    draw = torch.rand(256, generator=torch.Generator().manual_seed(1))
    present = torch.arange(256) < 100
    error, _ = fit_bits(0.5 + 0.1 * (draw - 0.5), present, seed=0)
    assert error < 0.8 * 0.1 / 12**0.5  # their own deviation


@pytest.mark.parametrize(
    ("channels", "width"), [((8, 12, 64), 32), ((4, 16, 64), 32), ((8, 16, 10), 32), ((8, 16, 64), 4)], ids=str
)
def test_too_few_channels(channels, width):
    torch.manual_seed(0)
    controlnet = MaisiControlNetModel(
        in_channels=CHANNELS,
        block_out_channels=(width, 32),
        layers_per_block=1,
        attention_levels=(False, True),
        norm_num_groups=4,
        conditioning_embedding_out_channels=channels,
    )
    before = controlnet.state_dict()["controlnet_cond_embedding.conv_in.weight"].clone()
    with pytest.raises(ValueError, match="cannot carry 6 latents from the start: it takes at least"):
        make_linear_condition(controlnet, make_cases(4))
    assert torch.equal(controlnet.state_dict()["controlnet_cond_embedding.conv_in.weight"], before)
