r"""
Train a diffusion UNet of MAISI on latents: go on with a model's own, or train a new one. The VAE says which of the two
it is: the image UNet on the latents of CT or MR volumes, or the mask UNet on those of label maps, with the sizes of
organs and tumors, the `organ_size` of the data list, as its condition.

Example:

```bash
accelerate launch scripts/train_unet.py --pretrained_model_name_or_path maisi-rflow-ct \
    --data_list latents/latents.json --output_dir unet
accelerate launch scripts/train_unet.py --vae_model_name_or_path vae --unet_config_name_or_path unet/config.json \
    --data_list latents/latents.json --output_dir unet
accelerate launch scripts/train_unet.py --vae_model_name_or_path mask-vae \
    --unet_config_name_or_path mask_unet/config.json --data_list mask-latents/latents.json --output_dir masks
```
"""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler

from maisi_diffusers import (
    AutoencoderKLMaisi,
    MaisiCTPipeline,
    MaisiMaskPipeline,
    MaisiRFlowScheduler,
    MaisiUNet3DConditionModel,
)
from maisi_diffusers.anatomy import CONTROLLABLE_ANATOMY
from maisi_diffusers.files import write_files_atomically
from maisi_diffusers.imaging import spacing_of, to_ras
from maisi_diffusers.training.arguments import (
    add_loss_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    parse_args,
)
from maisi_diffusers.training.base_model import add_model_arguments, load_any_base_model
from maisi_diffusers.training.data_list import Case, read_data_list, split_fold
from maisi_diffusers.training.dataset import LatentDataset
from maisi_diffusers.training.latents import encodes_labels
from maisi_diffusers.training.loop import Trainer, settings_before
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
from maisi_diffusers.training.validation import log_pictures, mean_loss, sample_masks, sample_unconditioned

logger = get_logger(__name__)

DDPM = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description="Train a diffusion UNet of MAISI, of images or of label maps.")
    add_model_arguments(parser, required=False)
    parser.add_argument("--vae_model_name_or_path", help="VAE that encoded the latents, instead of the model's")
    parser.add_argument("--unet_config_name_or_path", help="train a new UNet with this config: a JSON file or folder")
    parser.add_argument(
        "--noise_scheduler", choices=["rflow", "ddpm"], help="of a new UNet; the model's own, or rflow, if not given"
    )
    parser.add_argument(
        "--base_img_size_numel",
        type=int,
        help="latent voxels at which timesteps of a new rectified flow are even; larger latents get more noise; "
        "32768, as published, if not given",
    )
    parser.add_argument(
        "--scaling_factor",
        type=float,
        help="of the latents; a new UNet's is 1 over the standard deviation of the first batch if not given",
    )
    add_run_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=1e-5, lr_scheduler="polynomial", weight_decay=None)
    group = parser.add_argument_group("what is trained")
    add_loss_arguments(group, "none, and no label maps are read,")
    group.add_argument(
        "--modality_dropout",
        type=float,
        default=0.1,
        help="share of cases whose modality is dropped to 0, and of those where it becomes its parent, ct or mri",
    )
    group.add_argument("--use_ema", action="store_true", help="save averaged weights")
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group = parser.add_argument_group("validation")
    group.add_argument("--num_validation_images", type=int, default=2, help="images or label maps to make")
    group.add_argument("--validation_num_inference_steps", type=int, help="the model's own number if not given")
    return parser


def load_pipeline(args: argparse.Namespace) -> MaisiCTPipeline | MaisiMaskPipeline:
    """
    The model to train in an image-only pipeline, or in one of label maps if the VAE is of these, in float32.

    Raises:
        ValueError: if neither a model nor the parts of a new one are given, or if these do not belong together.
    """
    base = None if args.pretrained_model_name_or_path is None else load_any_base_model(args)
    if base is None and None in (args.vae_model_name_or_path, args.unet_config_name_or_path):
        raise ValueError(
            "nothing to train: give --pretrained_model_name_or_path, or for a new UNet --vae_model_name_or_path and "
            "--unet_config_name_or_path"
        )
    vae, unet, scheduler = (None,) * 3 if base is None else parts_of(base)
    if args.vae_model_name_or_path is not None:
        vae = AutoencoderKLMaisi.from_pretrained(args.vae_model_name_or_path, cache_dir=args.cache_dir)
    if args.unet_config_name_or_path is not None:
        config = MaisiUNet3DConditionModel.load_config(args.unet_config_name_or_path, cache_dir=args.cache_dir)
        unet = MaisiUNet3DConditionModel.from_config(config)
    check_parts(base, vae, unet)
    is_new_scheduler = args.noise_scheduler is not None or base is None
    if args.base_img_size_numel is not None and (args.noise_scheduler == "ddpm" or not is_new_scheduler):
        raise ValueError(
            "--base_img_size_numel is of a new rectified flow: add --noise_scheduler rflow, or leave it out"
        )
    if is_new_scheduler:
        even_at = {} if args.base_img_size_numel is None else {"base_img_size_numel": args.base_img_size_numel}
        scheduler = DDPMScheduler(**DDPM) if args.noise_scheduler == "ddpm" else MaisiRFlowScheduler(**even_at)
    settings = {}
    if base is not None:
        settings = {
            name: value for name, value in base.config.items() if name[0] != "_" and name not in base.components
        }
    if is_new_scheduler:
        for name in ("prediction_type", "num_inference_steps", "mask_prediction_type", "mask_num_inference_steps"):
            settings.pop(name, None)
    if encodes_labels(vae):
        return MaisiMaskPipeline(vae, unet, scheduler, **settings)
    settings.setdefault("num_inference_steps", 1000 if args.noise_scheduler == "ddpm" else 30)
    return MaisiCTPipeline(vae, unet, scheduler, **settings)


def parts_of(
    pipe: MaisiCTPipeline | MaisiMaskPipeline,
) -> tuple[AutoencoderKLMaisi, MaisiUNet3DConditionModel, DDPMScheduler | MaisiRFlowScheduler]:
    """VAE, UNet and scheduler of a pipeline of either kind."""
    if isinstance(pipe, MaisiMaskPipeline):
        return pipe.mask_vae, pipe.mask_unet, pipe.mask_scheduler
    return pipe.vae, pipe.unet, pipe.scheduler


def check_parts(
    base: MaisiCTPipeline | MaisiMaskPipeline | None, vae: AutoencoderKLMaisi, unet: MaisiUNet3DConditionModel
) -> None:
    """Refuse a VAE and a UNet that do not belong together, or not to the model; raises a `ValueError`."""
    kind, needed = "images", {"cross_attention_dim": None}
    if encodes_labels(vae):
        kind = "label maps"
        needed = {"cross_attention_dim": len(CONTROLLABLE_ANATOMY), "num_class_embeds": None}
        needed |= {"use_spacing": False, "use_region_index": False}
    given = {name: unet.config[name] for name in needed}
    if given != needed:
        raise ValueError(
            f"the VAE is of {kind} and needs a UNet with {needed}, not {given}: correct --unet_config_name_or_path, "
            "or give the VAE that encoded the latents"
        )
    if base is not None and isinstance(base, MaisiMaskPipeline) != encodes_labels(vae):
        raise ValueError(
            f"the VAE is of {kind}, --pretrained_model_name_or_path is not: leave that out to train a new UNet, or "
            "give the VAE that encoded the latents"
        )


def mask_grid(cases: list[Case], ratio: int) -> dict[str, list]:
    """
    The grid of the label maps that a model of these cases makes: the size that most latents have, and along each axis
    the median of the spacings, `ratio` times finer than the latents'.
    """
    latents = [to_ras(nib.load(case.image)) for case in cases]
    (size, _), *others = Counter(latent.shape[:3] for latent in latents).most_common()
    spacings = np.array([spacing_of(latent)[:3] for latent in latents]) / ratio
    spacing = np.median(spacings, axis=0).round(4)
    if others or not np.allclose(spacings, spacing, rtol=0.01):
        logger.warning(f"label maps differ in size or spacing: the model is said to make {size} at {spacing} mm")
    return {"mask_latent_size": [int(n) for n in size], "mask_spacing": spacing.tolist()}


def first_scaling_factor(accelerator: Accelerator, dataloader: torch.utils.data.DataLoader) -> float:
    """1 over the standard deviation of the first batch of latents, as published; of all processes' together."""
    latents = next(iter(dataloader))["latents"]
    mine = latents.cpu().double()  # a device may have no such precision
    count = accelerator.reduce(torch.tensor(mine.numel(), device=latents.device)).item()
    mean = accelerator.reduce(mine.sum().div(count).to(latents)).item()
    variance = accelerator.reduce((mine - mean).square().sum().div(count - 1).to(latents)).item()
    return variance**-0.5


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
    vae, unet, scheduler = parts_of(pipe)
    is_of_masks = isinstance(pipe, MaisiMaskPipeline)
    unet_name = "mask_unet" if is_of_masks else "unet"
    ratio = vae.spatial_compression_ratio
    check_training_cases(data_list, unet, ratio, args.train_batch_size, bool(args.weighted_loss_label))
    if is_of_masks:
        pipe.register_to_config(**mask_grid(train_cases, ratio))
    vae.requires_grad_(False).eval()
    unet.train()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = list(unet.parameters())
    ema = make_ema(accelerator, trained, args.ema_decay) if args.use_ema else None

    # 2. Data, optimiser
    make_dataset = partial(
        LatentDataset,
        scheduler=scheduler,
        seed=args.seed,
        with_labels=bool(args.weighted_loss_label),
        latent_channels=unet.config.in_channels,
    )
    dataset = make_dataset(train_cases, modality_dropout=args.modality_dropout)
    validation_set = make_dataset(held_out)
    dataloader = torch.utils.data.DataLoader(
        dataset, args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    optimizer = make_optimizer(trained, args)
    model, optimizer, dataloader = accelerator.prepare(unet, optimizer, dataloader)
    trainer = Trainer(accelerator, args, dataloader, train_cases, [model])
    lr_scheduler = accelerator.prepare(
        make_lr_scheduler(optimizer, args, trainer.max_train_steps, accelerator.num_processes)
    )
    if args.scaling_factor is not None:
        vae.register_to_config(scaling_factor=args.scaling_factor)
    elif args.unet_config_name_or_path is not None:
        # With other processes the first batch is another: a run that goes on keeps what it began with.
        earlier = settings_before(args).get("scaling_factor")
        args.scaling_factor = first_scaling_factor(accelerator, dataloader) if earlier is None else earlier
        vae.register_to_config(scaling_factor=args.scaling_factor)
    logger.info(f"scaling factor {vae.config.scaling_factor}")

    # 3. Steps
    objective = DiffusionObjective(
        model,
        unet.config,
        scheduler,
        vae.config.scaling_factor,
        args.loss_type,
        ratio,
        tuple(args.weighted_loss_label or ()),
        args.weighted_loss,
    )

    def train_step(batch: dict) -> dict[str, torch.Tensor]:
        losses = objective(batch)
        trainer.update(losses["loss"], model.parameters(), optimizer, lr_scheduler)
        if ema is not None and accelerator.sync_gradients:
            ema.step(trained)
        return losses

    def validate(step: int) -> dict[str, float]:
        folder = Path(args.output_dir, "validation", f"step-{step}")
        cases = held_out[: args.num_validation_images]
        sample = sample_masks if is_of_masks else sample_unconditioned
        with averaged(ema, trained):
            loss = mean_loss(objective, validation_set, accelerator.device)
            vae.to(accelerator.device)
            sample(pipe, cases, folder, args.validation_num_inference_steps, args.seed)
            vae.to("cpu")
        log_pictures(accelerator, folder, step)
        return {"validation_loss": loss}

    def save_model(checkpoint: Path) -> None:
        with averaged(ema, trained):
            save_trained(accelerator, model, lambda model: model.save_pretrained(checkpoint / unet_name))

    trainer.fit(train_step, save_model, validate if held_out else None)

    # 4. Results: a pipeline that makes images without label maps, or label maps
    with write_files_atomically(args.output_dir) as temporary, averaged(ema, trained):

        def save_pipeline(model: MaisiUNet3DConditionModel) -> None:
            pipe.register_modules(**{unet_name: model})
            pipe.save_pretrained(temporary)

        save_trained(accelerator, model, save_pipeline)
    if accelerator.is_main_process:
        kind = "A MAISI pipeline of label maps" if is_of_masks else "An image-only MAISI pipeline"
        use = "" if is_of_masks else ", train a ControlNet for it with `scripts/train_controlnet.py`"
        description = (
            f"{kind} whose UNet was trained for {trainer.global_step} steps on {len(train_cases)} cases. Load it with "
            f"`{type(pipe).__name__}.from_pretrained`{use}. What it makes is synthetic: it is not for diagnosis."
        )
        write_model_card(Path(args.output_dir), args.pretrained_model_name_or_path, description, [])
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(train, parse_args(make_parser()))
