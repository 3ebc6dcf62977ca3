"""torch.compile: one graph for a whole network, and compiled blocks that are shared."""

import pytest
import torch
from torch._dynamo.utils import counters

from .networks import DENOISERS, KINDS, VAES, build, deviation, inputs, output

pytestmark = pytest.mark.usefixtures("no_grad")

# Traces and lowers as the default does, without the minutes of C++ compilation.
BACKEND = "aot_eager"
# As deep as the published networks, and as different from level to level, but narrow.
PUBLISHED_LEVELS = {
    **{
        kind: {
            "block_out_channels": (32, 64, 96, 128),
            "layers_per_block": 2,
            "attention_levels": (False, False, True, True),
        }
        for kind in DENOISERS
    },
    "image vae": {"block_out_channels": (32, 64, 96), "layers_per_block": 2},
    "mask vae": {"block_out_channels": (16, 32, 48), "layers_per_block": (1, 2, 2)},
}
# Of latents. The denoisers halve them three times, and a compiled axis of length 1 is a case of its own.
DENOISER_SIZES = [(16, 16, 16), (16, 16, 32)]
VAE_SIZES = [(4, 4, 4), (4, 4, 8)]
PIPELINE = ["rflow unet", "controlnet", "image vae", "mask unet", "mask vae"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def timesteps(arguments):
    """The same arguments at the timesteps of a sampling run, one after the other, as a pipeline gives them."""
    return [arguments | {"timestep": timestep} for timestep in torch.tensor([1000.0, 871.25, 13.0])]


def assert_one_graph(compiled, model, runs):
    """Compiled at the first run, without graph breaks, and never again."""
    for i, arguments in enumerate(runs):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            result = output(compiled, arguments)
        assert deviation(result, output(model, arguments)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("kind", DENOISERS)
def test_denoiser(kind):
    model = build(kind)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    assert_one_graph(compiled, model, timesteps(inputs(kind, 1)))


@pytest.mark.parametrize("kind", ["rflow unet", "ddpm unet"])
def test_unet_with_controlnet(kind):
    model, controlnet = build(kind), build("controlnet")
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    runs = []
    for arguments, condition in zip(timesteps(inputs(kind, 1)), timesteps(inputs("controlnet", 1))):
        residuals, middle = controlnet(**condition, return_dict=False)
        extra = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
        runs.append(arguments | extra)
    assert_one_graph(compiled, model, runs)


def test_controlnet_with_an_embedded_condition():
    model, arguments = build("controlnet"), inputs("controlnet", 1)
    condition = arguments.pop("controlnet_cond")
    embed = torch.compile(model.embed_condition, fullgraph=True, backend=BACKEND)
    arguments["controlnet_cond_embedding"] = embed(condition)
    assert deviation(arguments["controlnet_cond_embedding"], model.embed_condition(condition)) < 1e-5
    counters.clear()
    assert_one_graph(torch.compile(model, fullgraph=True, backend=BACKEND), model, timesteps(arguments))


@pytest.mark.parametrize("kind", VAES)
def test_vae(kind):
    vae, x = build(kind), inputs(kind, 1)["sample"]
    encode = torch.compile(vae.encode, fullgraph=True, backend=BACKEND)
    decode = torch.compile(vae.decode, fullgraph=True, backend=BACKEND)
    latent = vae.encode(x).latent_dist.mode()
    for i in range(2):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert deviation(encode(x).latent_dist.parameters, vae.encode(x).latent_dist.parameters) < 1e-5
            assert deviation(decode(latent).sample, vae.decode(latent).sample) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def sizes(kind):
    return VAE_SIZES if kind in VAES else DENOISER_SIZES


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_blocks(kind):
    model, arguments = build(kind, **PUBLISHED_LEVELS[kind]), inputs(kind, 1, sizes(kind)[0])
    expected = output(model, arguments)
    model.compile_repeated_blocks(fullgraph=True, backend=BACKEND)
    assert deviation(output(model, arguments), expected) < 1e-5
    # One graph for each of two levels with attention; one for each half of a VAE.
    assert counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        output(model, arguments)


@pytest.mark.slow
def test_repeated_blocks_of_all_networks():
    """In one process, where the graphs of all networks and sizes count together; too many raise an error."""
    models = {kind: build(kind, **PUBLISHED_LEVELS[kind]) for kind in PIPELINE}
    arguments = [(kind, inputs(kind, 1, sizes(kind)[i])) for i in range(2) for kind in models]
    expected = [output(models[kind], values) for kind, values in arguments]
    for model in models.values():
        # Whether a block is compiled again depends on the tracing alone.
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for (kind, values), reference in zip(arguments, expected):
        assert deviation(output(models[kind], values), reference) < 1e-5


def test_gradients():
    model, arguments = build("rflow unet"), inputs("rflow unet", 1)
    gradients = []
    for function in (model, torch.compile(model, fullgraph=True, backend=BACKEND)):
        model.zero_grad()
        with torch.enable_grad():
            output(function, arguments).square().mean().backward()
        gradients.append(model.conv_in.weight.grad.clone())
    assert deviation(*gradients) < 1e-5


@pytest.mark.slow
def test_inductor():
    model, compiled = build("rflow unet"), build("rflow unet")
    compiled.compile_repeated_blocks(fullgraph=True)
    assert_one_graph(compiled, model, timesteps(inputs("rflow unet", 1)))
