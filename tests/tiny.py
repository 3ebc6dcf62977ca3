"""Tiny pipelines with random weights, and label maps for them."""

import nibabel as nib
import numpy as np
import torch
from diffusers import DDPMScheduler

from maisi_diffusers import (
    AutoencoderKLMaisi,
    MaisiControlNetModel,
    MaisiCTPipeline,
    MaisiRFlowScheduler,
    MaisiUNet3DConditionModel,
)

# Sizes must divide by 4 (VAE) times 2 (two levels of the UNet).
MULTIPLE = 8
SIZE = (24, 16, 32)
SPACING = (2.0, 2.0, 3.0)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialised layers weights too, so that every input reaches the output."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=(parameter.shape[0] / parameter.numel()) ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_pipeline(version: str = "rflow-ct", seed: int = 0, with_mask_networks: bool = True) -> MaisiCTPipeline:
    """A pipeline of either kind; its steps are few, its rules none but divisibility."""
    torch.manual_seed(seed)
    is_rflow = version.startswith("rflow")
    vae = {"block_out_channels": (16, 16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    shared = {
        "block_out_channels": (64, 64),
        "layers_per_block": 1,
        "attention_levels": (False, True),
        "attention_head_dim": 32,
    }
    image = {
        **shared,
        "resnet_updown": is_rflow,
        "attention_out_proj": is_rflow,
        "num_class_embeds": 128 if is_rflow else None,
    }
    ddpm = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}
    mask_networks = {}
    if with_mask_networks:
        mask_networks = {
            "mask_vae": randomize(AutoencoderKLMaisi(8, 125, **vae, use_conv_transpose=True, scaling_factor=0.9)),
            "mask_unet": randomize(
                MaisiUNet3DConditionModel(
                    **shared,
                    resnet_updown=False,
                    num_class_embeds=None,
                    use_spacing=False,
                    cross_attention_dim=10,
                    upcast_attention=True,
                )
            ),
            "mask_scheduler": DDPMScheduler(num_train_timesteps=3, **ddpm),
        }
    pipe = MaisiCTPipeline(
        vae=randomize(AutoencoderKLMaisi(**vae, scaling_factor=1.3)),
        unet=randomize(MaisiUNet3DConditionModel(**image, use_region_index=not is_rflow)),
        controlnet=randomize(MaisiControlNetModel(**image)),
        scheduler=MaisiRFlowScheduler(monai_rounding=True) if is_rflow else DDPMScheduler(**ddpm),
        **mask_networks,
        num_inference_steps=2,
        mask_latent_size=(4, 4, 4),
        mask_spacing=(6.0, 6.0, 6.0),
        quality_thresholds={},  # of random weights nothing would pass
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_label_map(
    size: tuple[int, int, int] = SIZE, spacing: tuple[float, float, float] = SPACING
) -> nib.Nifti1Image:
    """A body with a liver and a hepatic tumor, a lung, a femur, and air around."""
    labels = np.zeros(size, dtype=np.uint8)
    x, y, z = (n // 8 for n in size)
    labels[x:-x, y:-y] = 200
    labels[2 * x : 5 * x, 2 * y : 6 * y, 3 * z : 5 * z] = 1
    labels[3 * x : 4 * x, 3 * y : 4 * y, 3 * z : 4 * z] = 26
    labels[2 * x : 5 * x, 2 * y : 5 * y, 6 * z : 7 * z] = 28
    labels[5 * x : 6 * x, 3 * y : 5 * y, : 2 * z] = 93
    return nib.Nifti1Image(labels, np.diag([*spacing, 1.0]))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator for the same result again."""
    return torch.Generator().manual_seed(seed)
