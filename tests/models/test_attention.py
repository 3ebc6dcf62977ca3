"""Attention processors and backends, the diffusers way."""

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

from maisi_diffusers.models import attention_maisi
from maisi_diffusers.models.attention_maisi import MaisiAttention, MaisiAttnProcessor

from .networks import DENOISERS, build, deviation, inputs, output, with_dtype

pytestmark = pytest.mark.usefixtures("no_grad")

# The second level's and the middle block's; a UNet has two more blocks on the way up.
BLOCKS = ["down_blocks.1.attentions.0", "mid_block.attentions.0"]
UP_BLOCKS = ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]


@pytest.fixture(params=DENOISERS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def restore_backend():
    """`set_attention_backend` also sets the backend of every other model in the process."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


def expected_processors(kind):
    blocks = BLOCKS if kind == "controlnet" else BLOCKS + UP_BLOCKS
    if kind == "mask unet":
        return {f"{block}.transformer_blocks.0.{name}.processor" for block in blocks for name in ("attn1", "attn2")}
    return {f"{block}.attn.processor" for block in blocks}


class Spy:
    """Attends as the built-in processor does, and remembers."""

    def __init__(self, factor=1.0):
        self.calls, self.factor = [], factor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None):
        self.calls.append((attn, encoder_hidden_states is not None))
        return self.factor * MaisiAttnProcessor()(attn, hidden_states, encoder_hidden_states)


def test_processors_are_listed(kind):
    model = build(kind)
    assert set(model.attn_processors) == expected_processors(kind)
    assert all(type(processor) is MaisiAttnProcessor for processor in model.attn_processors.values())


def test_one_custom_processor_for_all(kind):
    model, arguments = build(kind), inputs(kind)
    expected = output(model, arguments)
    spy = Spy()
    model.set_attn_processor(spy)
    assert torch.equal(output(model, arguments), expected)
    layers = [module for module in model.modules() if isinstance(module, MaisiAttention)]
    assert [attn for attn, _ in spy.calls] and {attn for attn, _ in spy.calls} == set(layers)
    assert len(spy.calls) == len(layers) == len(expected_processors(kind))
    assert all(has_context == attn.is_cross_attention for attn, has_context in spy.calls)

    spy.factor = 0.0
    assert deviation(output(model, arguments), expected) > 1e-3


def test_custom_processors_by_name(kind):
    model, arguments = build(kind), inputs(kind)
    expected = output(model, arguments)
    spies = {name: Spy() for name in model.attn_processors}
    model.set_attn_processor(dict(spies))
    assert model.attn_processors == spies
    assert torch.equal(output(model, arguments), expected)
    for name, spy in spies.items():
        assert [attn for attn, _ in spy.calls] == [model.get_submodule(name.removesuffix(".processor"))]
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(dict(list(spies.items())[1:]))


def test_no_weights_in_processors(kind):
    model = build(kind)
    names = set(model.state_dict())
    model.set_attn_processor(MaisiAttnProcessor())
    assert set(model.state_dict()) == names and not any("processor" in name for name in names)


@pytest.fixture
def math_calls(monkeypatch):
    """How often the plain implementation of attention was called."""
    calls, original = [], _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def spy(**kwargs):
        calls.append(kwargs)
        return original(**kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, spy)
    return calls


def test_set_attention_backend(kind, math_calls):
    model, other, arguments = build(kind), build(kind), inputs(kind)
    expected = output(model, arguments)
    model.set_attention_backend("native")
    assert torch.equal(output(model, arguments), expected) and not math_calls

    model.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert deviation(output(model, arguments), expected) < 1e-5
    assert len(math_calls) == len(expected_processors(kind))

    output(other, arguments)  # a model whose backend was not set
    model.reset_attention_backend()
    assert torch.equal(output(model, arguments), expected)
    assert len(math_calls) == len(expected_processors(kind))
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("no such backend")


def test_attention_backend_context(kind, math_calls):
    model, arguments = build(kind), inputs(kind)
    expected = output(model, arguments)
    with attention_backend("_native_math"):
        assert deviation(output(model, arguments), expected) < 1e-5
    assert len(math_calls) == len(expected_processors(kind))
    assert torch.equal(output(model, arguments), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mask_unet_attends_in_float32(kind, dtype, monkeypatch):
    seen = set()

    def spy(query, key, value, **kwargs):
        seen.update({query.dtype, key.dtype, value.dtype})
        return dispatch_attention_fn(query, key, value, **kwargs)

    monkeypatch.setattr(attention_maisi, "dispatch_attention_fn", spy)
    model = build(kind).to(dtype)
    result = output(model, with_dtype(inputs(kind), dtype))
    assert seen == {torch.float32 if kind == "mask unet" else dtype}
    assert result.dtype == dtype
    assert deviation(result.float(), output(build(kind), inputs(kind))) < 0.05


def test_fusing_projections_changes_nothing(kind):
    model, arguments = build(kind), inputs(kind)
    expected, names = output(model, arguments), set(model.state_dict())
    model.fuse_qkv_projections()
    assert torch.equal(output(model, arguments), expected) and set(model.state_dict()) == names
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, arguments), expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_memory_layout_of_the_input_is_kept(kind, batch):
    """Tokens are laid out with the channels last; further convolutions should not have to be."""
    model = build(kind)
    blocks = [module for module in model.modules() if "attentions" in dict(module.named_children())]
    layouts = []
    for block in blocks:
        for attention in block.attentions:
            attention.register_forward_hook(lambda _, args, result: layouts.append((args[0], result)))
    output(model, inputs(kind, batch))
    assert len(layouts) == len(BLOCKS if kind == "controlnet" else BLOCKS + UP_BLOCKS)
    assert all(hidden_states.is_contiguous() and result.is_contiguous() for hidden_states, result in layouts)
