"""Small networks of every kind, and inputs for them."""

import torch

from maisi_diffusers import AutoencoderKLMaisi, MaisiControlNetModel, MaisiUNet3DConditionModel

TWO_LEVELS = {"block_out_channels": (64, 64), "layers_per_block": 1, "attention_levels": (False, True)}

KINDS = {
    "rflow unet": (MaisiUNet3DConditionModel, {}),
    "ddpm unet": (
        MaisiUNet3DConditionModel,
        {
            "attention_out_proj": False,
            "resnet_updown": False,
            "num_class_embeds": None,
            "use_region_index": True,
        },
    ),
    "mask unet": (
        MaisiUNet3DConditionModel,
        {
            "resnet_updown": False,
            "num_class_embeds": None,
            "use_spacing": False,
            "cross_attention_dim": 10,
            "upcast_attention": True,
        },
    ),
    "controlnet": (MaisiControlNetModel, {"conditioning_embedding_out_channels": (8, 16, 32)}),
    "image vae": (
        AutoencoderKLMaisi,
        {"block_out_channels": (32, 32, 48), "layers_per_block": 1, "norm_num_groups": 16},
    ),
    "mask vae": (
        AutoencoderKLMaisi,
        {
            "in_channels": 8,
            "out_channels": 11,
            "block_out_channels": (16, 32, 32),
            "layers_per_block": (1, 2, 1),
            "norm_num_groups": 8,
            "use_conv_transpose": True,
        },
    ),
}
UNETS = ("rflow unet", "ddpm unet", "mask unet")
DENOISERS = (*UNETS, "controlnet")
VAES = ("image vae", "mask vae")

LATENT = (4, 2, 6)


def build(kind: str, seed: int = 0, **overrides) -> torch.nn.Module:
    """A network in evaluation mode, in which every weight and every input shows in the output."""
    cls, config = KINDS[kind]
    if kind in DENOISERS:
        config = {**TWO_LEVELS, **config}
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = cls(**{**config, **overrides})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        elif name.startswith(("spacing", "top_region", "bottom_region")) and "linear_1" in name:
            parameter.data /= 100  # these inputs come a hundredfold
    return model.eval()


def inputs(kind: str, batch: int = 2, size: tuple[int, int, int] = LATENT, seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of a network's `forward`; `size` is that of the latent."""
    generator = torch.Generator().manual_seed(seed)
    grid = tuple(4 * length for length in size)
    if kind == "image vae":
        return {"sample": torch.rand(batch, 1, *grid, generator=generator)}
    if kind == "mask vae":
        return {"sample": torch.randint(0, 2, (batch, 8, *grid), generator=generator).float()}
    arguments = {
        "sample": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.tensor([871.25, 13.0])[:batch],
    }
    if kind in ("rflow unet", "controlnet"):
        arguments["class_labels"] = torch.tensor([1, 9])[:batch]
    if kind in ("rflow unet", "ddpm unet"):
        arguments["spacing"] = torch.tensor([[75.0, 75.0, 250.0], [150.0, 150.0, 100.0]])[:batch]
    if kind == "ddpm unet":
        arguments["top_region_index"] = torch.eye(4)[[1, 0]][:batch] * 100
        arguments["bottom_region_index"] = torch.eye(4)[[2, 3]][:batch] * 100
    if kind == "mask unet":
        arguments["encoder_hidden_states"] = torch.rand(batch, 3, 10, generator=generator)
    if kind == "controlnet":
        arguments["controlnet_cond"] = torch.randint(0, 2, (batch, 8, *grid), generator=generator).float()
    return arguments


def with_dtype(arguments: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Volumes and contexts in another dtype; timesteps and labels as they are."""
    cast = ("sample", "controlnet_cond", "encoder_hidden_states")
    return {name: value.to(dtype) if name in cast else value for name, value in arguments.items()}


def output(model: torch.nn.Module, arguments: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a network computes, all of it in one flat tensor."""
    result = model(**arguments, return_dict=False)
    if len(result) == 2:  # a ControlNet
        result = (*result[0], result[1])
    return torch.cat([tensor.flatten() for tensor in result])


def deviation(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    assert one.shape == other.shape
    return ((one - other).abs().max() / other.abs().max()).item()
