"""MONAI's networks with random weights, saved in the published layout; and its sampling loops, written out."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

VERSIONS = ("rflow-ct", "ddpm-ct")


@dataclass(frozen=True)
class Size:
    """
    How large the networks of one test configuration are.

    Args:
        channels: of the UNets' levels; 64 at least, since a norm with as many groups as channels hides the embeddings.
        res_blocks: of the UNets' levels.
        attention: whether a level has attention.
        head_channels: of the UNets' levels.
        vae_channels: of the VAEs' levels.
        vae_res_blocks: of the VAEs' levels.
        latent: voxels of the latents along X, Y, Z.
        groups: of the norms.
    """

    channels: list[int]
    res_blocks: list[int]
    attention: list[bool]
    head_channels: list[int]
    vae_channels: list[int]
    vae_res_blocks: list[int]
    latent: tuple[int, int, int]
    groups: int = 32


SIZES = {
    "two levels": Size([64, 128], [1, 1], [False, True], [0, 32], [64, 96, 64], [1, 1, 1], (4, 4, 6)),
    "three levels": Size(
        [64, 128, 64], [2, 1, 1], [False, True, True], [0, 64, 16], [64, 64, 128], [1, 2, 1], (8, 4, 8)
    ),
    "four levels": Size(
        [64, 64, 128, 128],
        [1, 2, 1, 2],
        [False, False, True, True],
        [0, 0, 32, 64],
        [96, 64, 64],
        [2, 1, 2],
        (8, 8, 8),
    ),
}
PUBLISHED = Size(
    [64, 128, 256, 512], [2] * 4, [False, False, True, True], [0, 0, 32, 32], [64, 128, 256], [2] * 3, (8, 8, 8)
)
PUBLISHED_MASK_VAE = {"num_channels": [32, 64, 128], "num_res_blocks": [1, 2, 2]}


def network_config(version: str, size: Size) -> dict:
    """A network configuration in the published schema."""
    is_rflow = version.startswith("rflow")
    unet = {
        "spatial_dims": "@spatial_dims",
        "in_channels": "@latent_channels",
        "num_channels": size.channels,
        "attention_levels": size.attention,
        "num_head_channels": size.head_channels,
        "num_res_blocks": size.res_blocks,
        "norm_num_groups": size.groups,
        "use_flash_attention": torch.cuda.is_available(),  # as released; MONAI refuses it elsewhere
        "include_fc": is_rflow,
        "resblock_updown": is_rflow,
    }
    if is_rflow:
        unet["num_class_embeds"] = 128
    vae = {
        "spatial_dims": "@spatial_dims",
        "latent_channels": "@latent_channels",
        "num_channels": size.vae_channels,
        "num_res_blocks": size.vae_res_blocks,
        "norm_num_groups": size.groups,
        "norm_eps": 1e-6,
        "attention_levels": [False] * len(size.vae_channels),
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
        "norm_float16": False,
        "num_splits": 1,
        "dim_split": 1,
        "save_mem": False,
    }
    ddpm = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "schedule": "scaled_linear_beta",
        "clip_sample": False,
    }
    rflow = {
        "num_train_timesteps": 1000,
        "use_discrete_timesteps": False,
        "use_timestep_transform": True,
        "sample_method": "uniform",
        "scale": 1.4,
    }
    mask_unet = {
        key: value for key, value in unet.items() if key not in ("num_channels", "include_fc", "num_class_embeds")
    }
    mask_vae_size = PUBLISHED_MASK_VAE if size is PUBLISHED else {}
    return {
        "spatial_dims": 3,
        "image_channels": 1,
        "latent_channels": 4,
        "include_body_region": not is_rflow,
        "autoencoder_def": {**vae, "in_channels": "@image_channels", "out_channels": "@image_channels"},
        "diffusion_unet_def": {
            **unet,
            "out_channels": "@latent_channels",
            "include_top_region_index_input": "@include_body_region",
            "include_bottom_region_index_input": "@include_body_region",
            "include_spacing_input": True,
        },
        "controlnet_def": {
            **unet,
            "conditioning_embedding_in_channels": 8,
            "conditioning_embedding_num_channels": [8, 32, 64],
        },
        "mask_generation_autoencoder_def": {
            **vae,
            "in_channels": 8,
            "out_channels": 125,
            "use_convtranspose": True,
            **mask_vae_size,
        },
        "mask_generation_diffusion_def": {
            **mask_unet,
            "channels": size.channels,
            "out_channels": "@latent_channels",
            "resblock_updown": False,
            "with_conditioning": True,
            "upcast_attention": True,
            "cross_attention_dim": 10,
        },
        "mask_generation_scale_factor": 1.0055984258651733,
        "noise_scheduler": rflow if is_rflow else ddpm,
        "mask_generation_noise_scheduler": ddpm,
    }


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights everywhere, zero-initialised layers and norms included, that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            scale = math.sqrt(parameter.shape[0] / parameter.numel())
            if name == "class_embedding.weight":
                scale = 1.0
            elif name.endswith("_layer.0.weight"):  # spacing and regions come a hundredfold
                scale /= 100
            parameter.data = noise * scale
        elif name.endswith("weight"):
            parameter.data = 1.0 + 0.3 * noise
        else:
            parameter.data = 0.3 * noise
    return model.eval()


def build_networks(version: str, size: Size) -> dict[str, torch.nn.Module]:
    """MONAI's networks of a configuration, with random weights."""
    config = network_config(version, size)

    def arguments(section: str) -> dict:
        return {
            key: config[value[1:]] if isinstance(value, str) and value.startswith("@") else value
            for key, value in config[section].items()
        }

    networks = {
        "vae": AutoencoderKlMaisi(**arguments("autoencoder_def")),
        "unet": DiffusionModelUNetMaisi(**arguments("diffusion_unet_def")),
        "controlnet": ControlNetMaisi(**arguments("controlnet_def"), use_checkpointing=False),
        "mask_vae": AutoencoderKlMaisi(**arguments("mask_generation_autoencoder_def")),
        "mask_unet": DiffusionModelUNet(**arguments("mask_generation_diffusion_def")),
    }
    return {name: randomize(network, seed) for seed, (name, network) in enumerate(networks.items())}


SCALE_FACTOR = 1.3
MASK_SCALE_FACTOR = 0.9


def save_checkpoint(folder: Path, version: str, networks: dict[str, torch.nn.Module], config: dict | None) -> Path:
    """Write the networks in the published layout; `config=None` leaves the configuration to the version."""
    name = version.removesuffix("-ct")
    models = folder / "models"
    models.mkdir(parents=True)
    torch.save(networks["vae"].state_dict(), models / "autoencoder_v1.pt")
    unet = {
        "epoch": 3,
        "loss": 0.25,
        "num_train_timesteps": 1000,
        "scale_factor": torch.tensor(SCALE_FACTOR),
        "unet_state_dict": networks["unet"].state_dict(),
    }
    torch.save(unet, models / f"diff_unet_3d_{name}-ct.pt")
    torch.save(
        {"epoch": 3, "loss": 0.25, "controlnet_state_dict": networks["controlnet"].state_dict()},
        models / f"controlnet_3d_{name}-ct.pt",
    )
    torch.save(networks["mask_vae"].state_dict(), models / "mask_generation_autoencoder.pt")
    mask_unet = {"unet_state_dict": networks["mask_unet"].state_dict(), "scale_factor": MASK_SCALE_FACTOR}
    torch.save(mask_unet, models / "mask_generation_diffusion_unet.pt")
    if config is not None:
        (folder / "configs").mkdir()
        (folder / "configs" / f"config_network_{name}.json").write_text(json.dumps(config))
    return folder


def label_bits(labels: torch.Tensor) -> torch.Tensor:
    """(N, 1, X, Y, Z) integers to (N, 8, X, Y, Z) bits, least significant first, one at a time."""
    return torch.cat([((labels.long() // 2**bit) % 2).float() for bit in range(8)], dim=1)


def make_scheduler(version: str, num_train_timesteps: int = 1000) -> RFlowScheduler | DDPMScheduler:
    """MONAI's scheduler as the published configuration makes it."""
    if version.startswith("rflow"):
        return RFlowScheduler(
            num_train_timesteps=num_train_timesteps,
            use_discrete_timesteps=False,
            use_timestep_transform=True,
            sample_method="uniform",
            scale=1.4,
        )
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=0.0015,
        beta_end=0.0195,
        schedule="scaled_linear_beta",
        clip_sample=False,
    )


def sample(scheduler, predict, latents: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
    """The published sampling loop: `predict` is called at every timestep, the last step goes to 0."""
    if isinstance(scheduler, RFlowScheduler):
        scheduler.set_timesteps(
            num_inference_steps=steps, input_img_size_numel=torch.prod(torch.tensor(latents.shape[2:]))
        )
    else:
        scheduler.set_timesteps(num_inference_steps=steps)
    timesteps = scheduler.timesteps
    next_timesteps = torch.cat((timesteps[1:], torch.tensor([0], dtype=timesteps.dtype)))
    for t, next_t in zip(timesteps, next_timesteps):
        output = predict(latents, torch.Tensor((t,)))
        if isinstance(scheduler, RFlowScheduler):
            latents, _ = scheduler.step(output, t, latents, next_t)
        else:
            latents, _ = scheduler.step(output, t, latents, generator=generator)
    return latents
