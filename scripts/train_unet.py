r"""
Train the diffusion UNet of MAISI on latents: go on with a model's own, or train a new one.

Example:

```bash
accelerate launch scripts/train_unet.py --pretrained_model_name_or_path maisi-rflow-ct \
    --data_list latents/latents.json --output_dir unet
accelerate launch scripts/train_unet.py --vae_model_name_or_path vae --unet_config_name_or_path unet/config.json \
    --data_list latents/latents.json --output_dir unet
```
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler

from maisi_diffusers import AutoencoderKLMaisi, MaisiCTPipeline, MaisiRFlowScheduler, MaisiUNet3DConditionModel
from maisi_diffusers.training.arguments import add_optimizer_arguments, add_run_arguments, parse_args
from maisi_diffusers.training.base_model import add_model_arguments, load_base_model
from maisi_diffusers.training.data_list import read_data_list, split_fold
from maisi_diffusers.training.dataset import LatentDataset
from maisi_diffusers.training.files import write_files_atomically
from maisi_diffusers.training.loop import Trainer
from maisi_diffusers.training.objectives import DiffusionObjective
from maisi_diffusers.training.optimizers import make_lr_scheduler, make_optimizer
from maisi_diffusers.training.preflight import check_training_cases
from maisi_diffusers.training.run import (
    averaged,
    is_sharded,
    make_accelerator,
    make_ema,
    push_to_hub,
    run_script,
    save_trained,
    write_model_card,
)
from maisi_diffusers.training.validation import log_pictures, mean_loss, sample_unconditioned

logger = get_logger(__name__)

DDPM = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description="Train the diffusion UNet of MAISI.")
    add_model_arguments(parser, required=False)
    parser.add_argument("--vae_model_name_or_path", help="VAE that encoded the latents, instead of the model's")
    parser.add_argument("--unet_config_name_or_path", help="train a new UNet with this config: a JSON file or folder")
    parser.add_argument(
        "--noise_scheduler", choices=["rflow", "ddpm"], help="of a new UNet; the model's own, or rflow, if not given"
    )
    parser.add_argument(
        "--scaling_factor",
        type=float,
        help="of the latents; a new UNet's is 1 over the standard deviation of the first batch if not given",
    )
    add_run_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=1e-5, lr_scheduler="polynomial", weight_decay=None)
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--modality_dropout",
        type=float,
        default=0.1,
        help="share of cases whose modality is dropped to 0, and of those where it becomes its parent, ct or mri",
    )
    group.add_argument("--use_ema", action="store_true", help="save averaged weights")
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group = parser.add_argument_group("validation")
    group.add_argument("--num_validation_images", type=int, default=2, help="images to make, without label maps")
    group.add_argument("--validation_num_inference_steps", type=int, help="the model's own number if not given")
    return parser


def load_pipeline(args: argparse.Namespace) -> MaisiCTPipeline:
    """
    The model to train in an image-only pipeline, in float32.

    Raises:
        ValueError: if neither a model nor the parts of a new one are given.
    """
    base = None if args.pretrained_model_name_or_path is None else load_base_model(args)
    if base is None and None in (args.vae_model_name_or_path, args.unet_config_name_or_path):
        raise ValueError(
            "nothing to train: give --pretrained_model_name_or_path, or for a new UNet --vae_model_name_or_path and "
            "--unet_config_name_or_path"
        )
    if args.vae_model_name_or_path is not None:
        vae = AutoencoderKLMaisi.from_pretrained(args.vae_model_name_or_path, cache_dir=args.cache_dir)
    else:
        vae = base.vae
    if args.unet_config_name_or_path is not None:
        config = MaisiUNet3DConditionModel.load_config(args.unet_config_name_or_path, cache_dir=args.cache_dir)
        unet = MaisiUNet3DConditionModel.from_config(config)
    else:
        unet = base.unet
    if args.noise_scheduler is not None or base is None:
        scheduler = DDPMScheduler(**DDPM) if args.noise_scheduler == "ddpm" else MaisiRFlowScheduler()
        steps = 1000 if args.noise_scheduler == "ddpm" else 30
    else:
        scheduler, steps = base.scheduler, base.config.num_inference_steps
    modality = "ct" if base is None else base.config.modality
    return MaisiCTPipeline(vae, unet, scheduler, num_inference_steps=steps, modality=modality)


def first_scaling_factor(accelerator: Accelerator, dataloader: torch.utils.data.DataLoader) -> float:
    """1 over the standard deviation of the first batch of latents, as published; of all processes' together."""
    latents = next(iter(dataloader))["latents"].double()
    sums = torch.stack([latents.sum(), latents.square().sum(), torch.tensor(latents.numel()).to(latents)])
    total, squares, count = accelerator.reduce(sums)
    return ((squares - total.square() / count) / (count - 1)).rsqrt().item()


def train(args: argparse.Namespace) -> None:
    """
    Train and save.

    Raises:
        OSError, ValueError: before any step, for what is missing or contradicts; later see [`Trainer.fit`].
    """
    data_list = read_data_list(args.data_list, args.data_root)
    train_cases, held_out = split_fold(data_list.cases, args.fold)
    accelerator = make_accelerator(args)
    if not held_out:
        logger.info("all cases are of one fold: all are for training, none for validation")
    if args.use_ema and is_sharded(accelerator):
        raise ValueError("--use_ema needs a whole network, not FSDP or DeepSpeed: leave it out")

    # 1. Networks
    pipe = load_pipeline(args)
    check_training_cases(
        data_list, pipe.unet, pipe.vae.spatial_compression_ratio, args.train_batch_size, with_labels=False
    )
    pipe.vae.requires_grad_(False).eval()
    pipe.unet.train()
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    ema = make_ema(accelerator, pipe.unet.parameters(), args.ema_decay) if args.use_ema else None

    # 2. Data, optimiser
    channels = pipe.unet.config.in_channels
    dataset = LatentDataset(
        train_cases, pipe.scheduler, args.seed, modality_dropout=args.modality_dropout, latent_channels=channels
    )
    validation_set = LatentDataset(held_out, pipe.scheduler, args.seed, latent_channels=channels)
    dataloader = torch.utils.data.DataLoader(
        dataset, args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    optimizer = make_optimizer(pipe.unet.parameters(), args)
    unet, optimizer, dataloader = accelerator.prepare(pipe.unet, optimizer, dataloader)
    trainer = Trainer(accelerator, args, dataloader, train_cases, [unet])
    lr_scheduler = accelerator.prepare(
        make_lr_scheduler(optimizer, args, trainer.max_train_steps, accelerator.num_processes)
    )
    if args.scaling_factor is not None:
        pipe.vae.register_to_config(scaling_factor=args.scaling_factor)
    elif args.unet_config_name_or_path is not None:
        pipe.vae.register_to_config(scaling_factor=first_scaling_factor(accelerator, dataloader))
    logger.info(f"scaling factor {pipe.vae.config.scaling_factor}")

    # 3. Steps
    objective = DiffusionObjective(unet, pipe.unet.config, pipe.scheduler, pipe.vae.config.scaling_factor)

    def train_step(batch: dict) -> dict[str, torch.Tensor]:
        losses = objective(batch)
        trainer.update(losses["loss"], unet, optimizer, lr_scheduler)
        if ema is not None and accelerator.sync_gradients:
            ema.step(pipe.unet.parameters())
        return losses

    def validate(step: int) -> dict[str, float]:
        folder = Path(args.output_dir, "validation", f"step-{step}")
        cases = held_out[: args.num_validation_images]
        with averaged(ema, pipe.unet):
            loss = mean_loss(objective, validation_set, accelerator.device)
            pipe.vae.to(accelerator.device)
            sample_unconditioned(pipe, cases, folder, args.validation_num_inference_steps, args.seed)
            pipe.vae.to("cpu")
        log_pictures(accelerator, folder, step)
        return {"validation_loss": loss}

    def save_model(checkpoint: Path) -> None:
        save_trained(accelerator, unet, ema, lambda model: model.save_pretrained(checkpoint / "unet"))

    trainer.fit(train_step, save_model, validate if held_out else None)

    # 4. Results: a pipeline that makes images without label maps
    with write_files_atomically(args.output_dir) as temporary:

        def save_pipeline(model: MaisiUNet3DConditionModel) -> None:
            pipe.register_modules(unet=model)
            pipe.save_pretrained(temporary)

        save_trained(accelerator, unet, ema, save_pipeline)
    if accelerator.is_main_process:
        description = (
            f"An image-only MAISI pipeline whose UNet was trained for {trainer.global_step} steps on "
            f"{len(train_cases)} cases. Load it with `MaisiCTPipeline.from_pretrained`, train a ControlNet for it "
            "with `scripts/train_controlnet.py`. The images it makes are synthetic: they are not for diagnosis."
        )
        write_model_card(Path(args.output_dir), args.pretrained_model_name_or_path, description, [])
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(train, parse_args(make_parser()))
