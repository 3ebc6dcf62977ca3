"""A ControlNet that begins with the latents that its labels' values stand for."""

import pytest
import torch

from maisi_diffusers import MaisiControlNetModel
from maisi_diffusers.anatomy import label_bits
from maisi_diffusers.training import linear_condition
from maisi_diffusers.training.linear_condition import (
    FIT_STEPS,
    RESTARTS,
    LabelledLatent,
    cubes_of,
    fit_bits,
    make_linear_condition,
    values_of,
)

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


def make_cases(ratio, enhancement=None):
    """
    Latents that are linear in the values of the cubes that they stand for, brightness before all. With an enhancement,
    every second case is of another modality: values of the labels that it names are higher there.
    """
    generator = torch.Generator().manual_seed(0)
    factors = 0.1 * torch.randn(CHANNELS, ratio**3, generator=generator) / ratio**3
    factors[0] += 3 / ratio**3
    cases = []
    for i in range(8):
        table = torch.zeros(256)
        for label, value in INTENSITIES.items():
            table[label] = value + (enhancement or {}).get(label, 0) * (i % 2)
        size = (8, 16, 12)
        coarse = torch.tensor(list(INTENSITIES))[torch.randint(len(INTENSITIES), (1, 4, 4, 4), generator=generator)]
        labels = coarse.repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(3, 3)
        latent = (cubes_of(table[labels.long()], ratio) @ factors.T + 0.3).T.reshape(
            CHANNELS, *(n // ratio for n in size)
        )
        cases.append(LabelledLatent(labels.to(torch.uint8), latent, 1 if i % 2 == 0 or enhancement is None else 2))
    return cases


def along_directions(controlnet, case):
    """What the embedding adds to the first features, along the directions that the noisy latents use least first."""
    directions, strengths, _ = torch.linalg.svd(controlnet.conv_in.weight.flatten(1))
    embedding = controlnet.embed_condition(label_bits(case.labels[None]))[0]
    return (torch.einsum("fc,fxyz->cxyz", directions, embedding) / strengths.square().mean().sqrt()).flip(0)


@pytest.mark.parametrize("channels", [(8, 16), (8, 16, 12), (10, 24, 64)], ids=str)
@torch.no_grad()
def test_embedding_holds_the_latents(channels):
    controlnet, cases = make_controlnet(channels), make_cases(2 ** (len(channels) - 1))
    (error,), (deviation,) = make_linear_condition(controlnet, cases)
    assert error < 0.01 * deviation
    for case in cases:
        along = along_directions(controlnet, case)
        assert (along[:CHANNELS] - case.latent).abs().max() < 0.03 * case.latent.abs().max()
        assert along[CHANNELS:].abs().max() < 1e-5


@pytest.mark.parametrize("channels", [(12, 18), (12, 18, 14)], ids=str)
@torch.no_grad()
def test_embedding_holds_what_differs_between_modalities(channels):
    """As a map, in one more direction: nothing where no contrast agent is, twice as much where there is twice."""
    enhancement = {1: 0.1, 200: 0.2}
    controlnet, cases = make_controlnet(channels), make_cases(2 ** (len(channels) - 1), enhancement)
    errors, deviations = make_linear_condition(controlnet, cases)
    assert all(error < 0.05 * deviation for error, deviation in zip(errors, deviations))
    table = torch.zeros(256)
    for label, more in enhancement.items():
        table[label] = more
    found, expected = [], []
    for case in cases:
        along = along_directions(controlnet, case)
        found.append(along[CHANNELS].flatten())
        expected.append(cubes_of(table[case.labels.long()], 2 ** (len(channels) - 1)).mean(1))
        assert along[CHANNELS + 1 :].abs().max() < 1e-5
    found, expected = torch.cat(found), torch.cat(expected)
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1].abs() > 0.99
    assert found[expected == 0].abs().max() < 0.05 * found.abs().max()


def test_all_of_it_learns():
    """No gradient is lost in what does nothing yet."""
    controlnet, cases = make_controlnet((8, 32, 64)), make_cases(4)
    make_linear_condition(controlnet, cases)
    embedding = controlnet.embed_condition(label_bits(cases[0].labels[None]))
    (embedding - 1).square().sum().backward()
    for name, parameter in controlnet.controlnet_cond_embedding.named_parameters():
        assert parameter.grad.any(), name


def test_few_channels_for_many_labels():
    """A hundred labels of random values: nearer than their mean is, and the largest ones the nearest."""
    values = 0.5 + 0.1 * (torch.rand(256, 1, generator=torch.Generator().manual_seed(1)) - 0.5)
    counts = torch.where(torch.arange(256) < 100, 100.0, 0.0)
    missed = values_of(fit_bits(values, counts, width=8, seed=0)) - values
    error = missed[:100].square().mean().sqrt()
    assert error < 0.8 * 0.1 / 12**0.5  # their own deviation
    counts[:100:10] *= 10_000
    missed = values_of(fit_bits(values, counts, width=8, seed=0)) - values
    assert missed[:100:10].square().mean().sqrt() < 0.2 * error


@pytest.mark.slow
def test_channels_for_many_labels(monkeypatch):
    """As many labels as phantoms have, and two values of each: all are met, those of few voxels too."""
    monkeypatch.setattr(linear_condition, "RESTARTS", RESTARTS)
    monkeypatch.setattr(linear_condition, "FIT_STEPS", FIT_STEPS)
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(256, 2, generator=generator)
    counts = 10 ** torch.randint(3, 9, (256,), generator=generator).float() * (torch.arange(256) < 120)
    missed = values_of(fit_bits(values, counts, width=16, seed=0)) - values
    assert missed[:120].abs().max() < 0.01


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
