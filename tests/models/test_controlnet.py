"""A ControlNet starts as a copy of the UNet's encoder that changes nothing."""

import pytest
import torch

from maisi_diffusers import MaisiControlNetModel, MaisiUNet3DConditionModel
from maisi_diffusers.models import controlnet_maisi

from .networks import build, deviation, inputs, output

IMAGE_UNETS = ("rflow unet", "ddpm unet")
NEW = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
COPIED_SETTINGS = {
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "attention_levels",
    "attention_head_dim",
    "attention_out_proj",
    "norm_num_groups",
    "norm_eps",
    "resnet_updown",
    "num_class_embeds",
}


@pytest.fixture(params=IMAGE_UNETS)
def unet(request):
    # Nothing is the default, and the levels differ, so that nothing can be taken from elsewhere.
    unet = build(
        request.param,
        block_out_channels=(64, 96),
        layers_per_block=(1, 2),
        attention_head_dim=(32, 16),
        norm_num_groups=16,
        norm_eps=1e-4,
    )
    unet.kind = request.param
    return unet


def controlnet_inputs(unet, batch=2):
    arguments = inputs("controlnet", batch)
    if unet.config.num_class_embeds is None:
        del arguments["class_labels"]
    return arguments


def trained(controlnet):
    """The zero convolutions are no longer zero."""
    torch.manual_seed(3)
    for name, parameter in controlnet.named_parameters():
        if name.startswith(NEW):
            torch.nn.init.normal_(parameter, std=0.1)
    return controlnet.eval()


def test_configuration(unet):
    controlnet = MaisiControlNetModel.from_unet(unet)
    assert COPIED_SETTINGS == set(controlnet.config) & set(unet.config) - {"_use_default_values"}
    assert all(controlnet.config[name] == unet.config[name] for name in COPIED_SETTINGS)
    assert controlnet.config.conditioning_channels == 8
    assert controlnet.config.conditioning_embedding_out_channels == (8, 32, 64)

    controlnet = MaisiControlNetModel.from_unet(
        unet, conditioning_channels=3, conditioning_embedding_out_channels=(4, 8, 12)
    )
    arguments = controlnet_inputs(unet)
    arguments["controlnet_cond"] = arguments["controlnet_cond"][:, :3]
    output(controlnet, arguments)


def test_weights(unet):
    controlnet = MaisiControlNetModel.from_unet(unet)
    source = unet.state_dict()
    time_embed_dim = unet.time_embedding.linear_2.out_features
    narrowed = 0
    for name, weight in controlnet.state_dict().items():
        if name.startswith(NEW):
            assert name not in source
        elif name.endswith("time_emb_proj.weight"):
            narrowed += 1
            assert weight.shape[1] == time_embed_dim < source[name].shape[1]
            assert torch.equal(weight, source[name][:, :time_embed_dim]), name
        else:
            assert torch.equal(weight, source[name]), name
    assert narrowed == sum(name.endswith("time_emb_proj.weight") for name in controlnet.state_dict()) > 0

    controlnet.conv_in.weight.data.zero_()  # a copy, not the UNet's own
    assert unet.conv_in.weight.any()


def test_architecture_alone(unet):
    torch.manual_seed(5)
    controlnet = MaisiControlNetModel.from_unet(unet, load_weights_from_unet=False)
    assert not torch.equal(controlnet.conv_in.weight, unet.conv_in.weight)
    assert not any(result.any() for result in output(controlnet, controlnet_inputs(unet)))


@torch.no_grad()
def test_encodes_as_the_unet_does(unet):
    """Without spacing and regions, the two see the same."""
    for embedding in (unet.spacing_embedding, unet.top_region_embedding, unet.bottom_region_embedding):
        if embedding is not None:
            embedding.linear_2.weight.zero_()
            embedding.linear_2.bias.zero_()
    seen = {}

    def remember(model):
        seen[model] = states = []
        for block in (model.conv_in, *model.down_blocks, model.mid_block):
            block.register_forward_hook(lambda _, args, result: states.append(result))

    controlnet = MaisiControlNetModel.from_unet(unet).eval()
    remember(unet), remember(controlnet)
    output(unet, inputs(unet.kind))
    output(controlnet, controlnet_inputs(unet))
    levels = len(unet.down_blocks)
    assert len(seen[unet]) == len(seen[controlnet]) == levels + 2
    for one, other in zip(seen[unet], seen[controlnet]):
        one, other = ([*x[1], x[0]] if isinstance(x, tuple) else [x] for x in (one, other))
        for result, expected in zip(one, other, strict=True):
            assert deviation(result, expected) < 1e-5


@torch.no_grad()
def test_starts_without_effect(unet):
    controlnet = MaisiControlNetModel.from_unet(unet).eval()
    residuals, middle = controlnet(**controlnet_inputs(unet), return_dict=False)
    assert not middle.any() and not any(residual.any() for residual in residuals)

    arguments = inputs(unet.kind)
    expected = output(unet, arguments)
    arguments |= {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    assert torch.equal(output(unet, arguments), expected)


@torch.no_grad()
def test_steers_after_training(unet):
    controlnet = trained(MaisiControlNetModel.from_unet(unet))
    arguments, condition = inputs(unet.kind), controlnet_inputs(unet)
    expected = output(unet, arguments)
    result = controlnet(**condition)
    residuals, middle = result.down_block_res_samples, result.mid_block_res_sample
    for extra in (
        {"down_block_additional_residuals": residuals},
        {"mid_block_additional_residual": middle},
        {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle},
    ):
        assert deviation(output(unet, arguments | extra), expected) > 1e-3

    condition["controlnet_cond"] = 1 - condition["controlnet_cond"]
    assert deviation(controlnet(**condition).mid_block_res_sample, middle) > 1e-3
    with pytest.raises(ValueError, match="shorter|longer"):
        output(unet, arguments | {"down_block_additional_residuals": residuals[:-1]})


def test_learns(unet):
    controlnet = MaisiControlNetModel.from_unet(unet)
    unet.requires_grad_(False)
    optimizer = torch.optim.SGD(controlnet.parameters(), lr=0.1)
    arguments, losses = inputs(unet.kind), []
    for _ in range(3):
        residuals, middle = controlnet(**controlnet_inputs(unet), return_dict=False)
        extra = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
        loss = (output(unet, arguments | extra) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    # After two steps the gradient has come through the zero convolutions to all the rest.
    assert all(parameter.grad.any() for name, parameter in controlnet.named_parameters() if "to_k.bias" not in name)


def test_dtype_and_reloaded_unet(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    reloaded = MaisiUNet3DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    controlnet = MaisiControlNetModel.from_unet(reloaded)
    assert {parameter.dtype for parameter in controlnet.parameters()} == {torch.bfloat16}
    assert torch.equal(controlnet.conv_in.weight, unet.conv_in.weight.bfloat16())


def test_mask_unet_is_refused():
    with pytest.raises(ValueError, match="cross_attention_dim=10.*give the image UNet"):
        MaisiControlNetModel.from_unet(build("mask unet"))


def test_unet_whose_weights_have_other_names_is_refused():
    lora = pytest.importorskip("peft").LoraConfig(target_modules=["conv1"])
    unet = build("rflow unet")
    unet.add_adapter(lora)
    with pytest.raises(KeyError, match="conv1.weight"):
        MaisiControlNetModel.from_unet(unet)


@torch.no_grad()
def test_condition_or_its_embedding():
    controlnet, arguments = build("controlnet"), inputs("controlnet")
    expected = output(controlnet, arguments)
    condition = arguments.pop("controlnet_cond")
    embedding = controlnet.embed_condition(condition)
    assert embedding.shape == (2, 64, *arguments["sample"].shape[2:])
    assert torch.equal(output(controlnet, {**arguments, "controlnet_cond_embedding": embedding}), expected)
    for wrong in ({}, {"controlnet_cond": condition, "controlnet_cond_embedding": embedding}):
        with pytest.raises(ValueError, match="exactly one"):
            controlnet(**arguments, **wrong)


@pytest.mark.parametrize("planes", [32, 35])
@torch.no_grad()
def test_large_condition_in_slabs(planes, monkeypatch):
    """Of a few planes at once, an even number; from the bits as bytes too."""
    controlnet = build("controlnet")
    bits = torch.randint(2, (1, 8, 160, 8, 4), dtype=torch.uint8)
    whole = controlnet.embed_condition(bits.float())
    layers, sizes = controlnet.controlnet_cond_embedding, {}
    for layer in (layers.conv_in, layers.blocks[2]):
        layer.register_forward_pre_hook(lambda layer, args: sizes.setdefault(layer, []).append(args[0].shape[2]))
    monkeypatch.setattr(controlnet_maisi, "SLAB_VALUES", planes * 8 * 8 * 4)
    assert deviation(controlnet.embed_condition(bits), whole) < 1e-6
    full, half = sizes.values()
    assert full == {32: [34, 38, 38, 38, 36], 35: [36, 40, 40, 40, 28]}[planes]
    assert half == {32: [66, 20], 35: [72, 14]}[planes]


@torch.no_grad()
def test_conditioning_scale():
    controlnet, arguments = build("controlnet"), inputs("controlnet")
    expected = output(controlnet, arguments)
    assert torch.equal(output(controlnet, {**arguments, "conditioning_scale": 0.5}), 0.5 * expected)
    assert not output(controlnet, {**arguments, "conditioning_scale": 0.0}).any()
