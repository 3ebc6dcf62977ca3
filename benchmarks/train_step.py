r"""
Seconds and peak memory of one training step of the ControlNet, side by side with MONAI's networks doing the same step.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --latent 32 --repeats 5

The published architecture (`rflow-ct`), float32, one case: ControlNet and frozen UNet forward, loss, backward, AdamW.
Each variant runs in a process of its own, so that its memory is its own; the variants take turns, so that what else
the machine does is shared by all, and the ratios are those of the fastest steps. Memory is what a step adds to the
process at its highest: gradients and activations, without weights and optimiser states. MONAI's networks are measured
as released, which is with the condition's embedding checkpointed, and without that.
"""

import argparse

import torch

from . import markdown
from .turns import serve, take_turns

VARIANTS = {
    "MONAI, as released": {"library": "monai", "checkpointing": True},
    "MONAI, no checkpointing": {"library": "monai", "checkpointing": False},
    "ours": {"library": "ours", "checkpointing": False},
    "ours, gradient checkpointing": {"library": "ours", "checkpointing": True},
}


def make_batch(latent: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random latents and labels, the same for every variant."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(1, 4, latent, latent, latent, generator=generator),
        "noise": torch.randn(1, 4, latent, latent, latent, generator=generator),
        "timesteps": torch.tensor([500.0]),
        "class_labels": torch.tensor([1]),
        "spacing": torch.tensor([[150.0, 150.0, 200.0]]),
        "labels": torch.randint(133, (1, 1, *[4 * latent] * 3), generator=generator, dtype=torch.uint8),
    }
    return {name: value.to(device) for name, value in batch.items()}


def make_monai_step(batch: dict[str, torch.Tensor], checkpointing: bool, device: torch.device):
    """MONAI's networks, its scheduler, `torch.optim.AdamW` as the published script makes it."""
    from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
    from monai.networks.schedulers import RFlowScheduler

    shared = {
        "spatial_dims": 3,
        "in_channels": 4,
        "num_channels": [64, 128, 256, 512],
        "attention_levels": [False, False, True, True],
        "num_head_channels": [0, 0, 32, 32],
        "num_res_blocks": 2,
        "resblock_updown": True,
        "include_fc": True,
        "num_class_embeds": 128,
        "use_flash_attention": device.type == "cuda",  # as released; MONAI refuses it elsewhere
    }
    unet = DiffusionModelUNetMaisi(
        **shared,
        out_channels=4,
        include_top_region_index_input=False,
        include_bottom_region_index_input=False,
        include_spacing_input=True,
    )
    unet.to(device).eval().requires_grad_(False)
    controlnet = ControlNetMaisi(
        **shared,
        conditioning_embedding_in_channels=8,
        conditioning_embedding_num_channels=[8, 32, 64],
        use_checkpointing=checkpointing,
    )
    controlnet.to(device).train()
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False, use_timestep_transform=True)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-5)
    target = batch["latents"] - batch["noise"]

    def step() -> None:
        timesteps, class_labels = batch["timesteps"], batch["class_labels"]
        noisy = scheduler.add_noise(batch["latents"], batch["noise"], timesteps)
        bits = torch.cat([((batch["labels"] >> bit) & 1).float() for bit in range(8)], dim=1)
        down, mid = controlnet(x=noisy, timesteps=timesteps, controlnet_cond=bits, class_labels=class_labels)
        prediction = unet(
            x=noisy,
            timesteps=timesteps,
            spacing_tensor=batch["spacing"],
            class_labels=class_labels,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        )
        torch.nn.functional.l1_loss(prediction, target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_our_step(batch: dict[str, torch.Tensor], checkpointing: bool, device: torch.device):
    """What `scripts/train_controlnet.py` does at each step."""
    from maisi_diffusers import MaisiControlNetModel, MaisiRFlowScheduler, MaisiUNet3DConditionModel
    from maisi_diffusers.training.objectives import ControlNetObjective
    from maisi_diffusers.training.optimizers import make_optimizer

    unet = MaisiUNet3DConditionModel().to(device).eval().requires_grad_(False)
    controlnet = MaisiControlNetModel.from_unet(unet).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    settings = argparse.Namespace(
        use_8bit_adam=False,
        learning_rate=1e-5,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        adam_weight_decay=1e-2,
    )
    optimizer = make_optimizer(controlnet.parameters(), settings)
    objective = ControlNetObjective(controlnet, controlnet.config, unet, MaisiRFlowScheduler(), scaling_factor=1.0)

    def step() -> None:
        objective(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", type=int, default=32, help="edge of the latent in voxels, a multiple of 8")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each variant")
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        settings = VARIANTS[args.serve]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        make = make_monai_step if settings["library"] == "monai" else make_our_step
        serve(make(make_batch(args.latent, device), settings["checkpointing"], device), device, lambda result: {})
        return
    command = ["-m", "benchmarks.train_step", "--latent", str(args.latent), "--serve"]
    results = take_turns({variant: [*command, variant] for variant in VARIANTS}, args.repeats)
    released = results["MONAI, as released"]
    print(f"One ControlNet step, latent {args.latent}^3, volume {4 * args.latent}^3, float32\n")
    rows = []
    for variant, result in results.items():
        faster, share = released["seconds"] / result["seconds"], result["megabytes"] / released["megabytes"]
        rows.append(
            [variant, f"{result['seconds']:.2f}", f"{faster:.2f}", f"{result['megabytes']:.0f}", f"{share:.2f}"]
        )
    print(markdown.table(["variant", "seconds", "times as fast", "peak MB", "share of the peak"], rows))


if __name__ == "__main__":
    main()
