"""Weights in the memory format in which inference is fastest."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from .networks import KINDS, VAES, build, deviation, inputs, output, with_dtype

CPU, LAST = torch.device("cpu"), torch.channels_last_3d


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def kernels(model):
    return [parameter for parameter in model.parameters() if parameter.dim() == 5 and parameter[0, 0].numel() > 1]


@pytest.mark.usefixtures("no_grad")
def test_16_bits_on_the_cpu(kind, tmp_path):
    model, arguments = build(kind).to(torch.bfloat16), with_dtype(inputs(kind), torch.bfloat16)
    if kind in VAES:
        model.disable_tiling()  # slabs have a layout of their own
    before, expected = {name: weight.clone() for name, weight in model.state_dict().items()}, output(model, arguments)
    features = []
    model.lay_out(CPU)
    assert all(kernel.is_contiguous(memory_format=LAST) for kernel in kernels(model))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d) and module.in_channels > 1:  # one channel lies either way
            module.register_forward_hook(lambda module, given, result: features.append(result))
    assert deviation(output(model, arguments).float(), expected.float()) < 0.03
    assert all(one.is_contiguous(memory_format=LAST) for one in features)
    state = model.state_dict()
    assert all(value.is_contiguous() for value in state.values())
    save_file(state, tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in saved)


@pytest.mark.usefixtures("no_grad")
def test_an_adapter_is_saved(tmp_path):
    model = build("rflow unet").to(torch.bfloat16)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False))
    before = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    model.lay_out(CPU)
    model.save_lora_adapter(tmp_path)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(saved) == len(before) > 8
    assert all(torch.equal(saved[name], before[name]) for name in saved)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, CPU), (torch.bfloat16, torch.device("cuda"))])
def test_left_alone(kind, dtype, device):
    """On a GPU also where the weights wait on the CPU."""
    model = build(kind).to(dtype)
    model.lay_out(device)
    assert all(kernel.is_contiguous() for kernel in kernels(model))
