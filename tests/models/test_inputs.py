"""What the UNets and the ControlNet take, and what they say when something is missing."""

import pytest
import torch

from .networks import DENOISERS, LATENT, build, deviation, inputs, output, with_dtype

pytestmark = pytest.mark.usefixtures("no_grad")

REQUIRED = [
    ("rflow unet", "class_labels"),
    ("rflow unet", "spacing"),
    ("ddpm unet", "spacing"),
    ("ddpm unet", "top_region_index"),
    ("ddpm unet", "bottom_region_index"),
    ("controlnet", "class_labels"),
]


@pytest.fixture(params=DENOISERS)
def kind(request):
    return request.param


@pytest.mark.parametrize(("kind", "name"), REQUIRED)
def test_missing_input(kind, name):
    model, arguments = build(kind), inputs(kind)
    del arguments[name]
    with pytest.raises(ValueError, match=f"this model takes `{name}`.* not given"):
        output(model, arguments)


def test_every_input_counts(kind):
    model, arguments = build(kind), inputs(kind)
    expected = output(model, arguments)
    for name, value in arguments.items():
        assert deviation(output(model, arguments | {name: value.flip(0)}), expected) > 1e-3, name


def test_samples_of_a_batch_are_independent(kind):
    model, arguments = build(kind), inputs(kind)
    both = model(**arguments, return_dict=False)[-1]
    for i in range(2):
        one = model(**{name: value[i : i + 1] for name, value in arguments.items()}, return_dict=False)[-1]
        assert deviation(one, both[i : i + 1]) < 1e-5


@pytest.mark.parametrize(
    "timestep", [500, 500.0, torch.tensor(500), torch.tensor(500.0), torch.tensor([500])], ids=str
)
def test_timestep_of_any_kind(kind, timestep):
    model, arguments = build(kind), inputs(kind)
    expected = output(model, arguments | {"timestep": torch.tensor([500.0, 500.0])})
    assert torch.equal(output(model, arguments | {"timestep": timestep}), expected)


def test_timesteps_are_embedded_in_float32(kind):
    """Bfloat16 has no whole numbers between 868 and 872."""
    model, seen = build(kind).bfloat16(), []
    model.time_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    arguments = with_dtype(inputs(kind), torch.bfloat16)
    for timestep in (torch.tensor([869.0, 869.5]), 869.0, 869.5):
        output(model, arguments | {"timestep": timestep})
    assert all(embedding.dtype == torch.bfloat16 for embedding in seen)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[2][0])
    assert not torch.equal(seen[0][0], seen[0][1])


def test_result(kind):
    model, arguments = build(kind), inputs(kind)
    result = model(**arguments)
    if kind == "controlnet":
        shapes = [tuple(residual.shape[1:]) for residual in result.down_block_res_samples]
        half = tuple(length // 2 for length in LATENT)
        assert shapes == [(64, *LATENT), (64, *LATENT), (64, *half), (64, *half)]
        assert result.mid_block_res_sample.shape == (2, 64, *half)
    else:
        assert result.sample.shape == arguments["sample"].shape
    assert isinstance(model(**arguments, return_dict=False), tuple)
