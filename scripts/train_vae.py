r"""
Train a VAE of MAISI on patches: go on with a model's own, or train a new one. Its config says which of the two it is:
the image VAE (1 channel in and out), on CT or MR volumes, or the mask VAE (8 in, 125 out), on their label maps.

Example:

```bash
accelerate launch scripts/train_vae.py --vae_model_name_or_path maisi-rflow-ct/vae --data_list dataset.json \
    --output_dir vae --patch_size 64
accelerate launch scripts/train_vae.py --vae_model_name_or_path vae \
    --discriminator_model_name_or_path vae/discriminator --data_list dataset.json --output_dir vae-128 --patch_size 128
accelerate launch scripts/train_vae.py --vae_config_name_or_path mask_vae/config.json --data_list dataset.json \
    --output_dir mask-vae --patch_size 64
```

Kidney cysts are part of their kidney for a mask VAE. Labels that it has no output for, which are seven of the eight
free ones, are an error.
"""

import argparse
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers.utils.torch_utils import randn_tensor

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.files import write_files_atomically
from maisi_diffusers.training.arguments import add_optimizer_arguments, add_run_arguments, parse_args
from maisi_diffusers.training.data_list import read_data_list, split_fold
from maisi_diffusers.training.discriminator import MaisiPatchDiscriminator
from maisi_diffusers.training.loop import Trainer
from maisi_diffusers.training.mask_classes import check_mask_labels
from maisi_diffusers.training.optimizers import make_lr_scheduler, make_optimizer
from maisi_diffusers.training.patches import AUGMENTATIONS
from maisi_diffusers.training.perceptual import load_perceptual_loss
from maisi_diffusers.training.randomness import case_generator
from maisi_diffusers.training.run import (
    is_sharded,
    make_accelerator,
    push_to_hub,
    run_script,
    save_trained,
    write_model_card,
)
from maisi_diffusers.training.vae_losses import adversarial_loss, kl_loss
from maisi_diffusers.training.vae_objectives import (
    RECONSTRUCTION_LOSSES,
    ImageObjective,
    LabelObjective,
    objective_class,
)

logger = get_logger(__name__)


class Reconstruction(torch.nn.Module):
    """The VAE with all that its losses need in one `forward`, so that it can be wrapped for distributed training."""

    def __init__(self, vae: AutoencoderKLMaisi):
        super().__init__()
        self.vae = vae

    def forward(
        self, sample: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, in_channels, X, Y, Z) -> reconstruction from a draw, mean and log-variance (N, C, X/4, Y/4, Z/4)."""
        posterior = self.vae.encode(sample).latent_dist
        noise = randn_tensor(posterior.mean.shape, generator=generators, device=sample.device, dtype=sample.dtype)
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        return reconstruction, posterior.mean, posterior.logvar


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description="Train a VAE of MAISI, of images or of label maps.")
    group = parser.add_argument_group("model")
    group.add_argument("--vae_model_name_or_path", help="VAE to go on with: a folder or a Hub id")
    group.add_argument("--vae_config_name_or_path", help="train a new VAE with this config: a JSON file or folder")
    group.add_argument(
        "--discriminator_model_name_or_path", help="discriminator of images to go on with; a new one if not given"
    )
    group.add_argument("--cache_dir", help="folder for models from the Hub")
    add_run_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=1e-4, lr_scheduler="constant_with_warmup", weight_decay=None)
    group = parser.add_argument_group("patches")
    group.add_argument("--patch_size", type=int, nargs="+", default=[64], help="voxels, one number or three")
    group.add_argument("--patches_per_case", type=int, default=1, help="patches of a volume to an epoch")
    group.add_argument("--cached_cases", type=int, default=0, help="volumes to keep in memory")
    group.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        default="full",
        help="full: as published; crop: patches at random places, as they are; none: the middle of each volume",
    )
    group = parser.add_argument_group("losses")
    group.add_argument("--kl_weight", type=float, default=1e-7, help="of the divergence, summed over a latent")
    group = parser.add_argument_group("losses of an image VAE")
    group.add_argument(
        "--reconstruction_loss",
        choices=RECONSTRUCTION_LOSSES,
        default="l1",
        help="l1: as published; l2: the mean square, in which noise counts less, and edges and bone more",
    )
    group.add_argument("--perceptual_weight", type=float, default=0.3, help="0 needs no pretrained network")
    group.add_argument("--perceptual_network", choices=["squeeze", "alex", "vgg"], default="squeeze")
    group.add_argument("--adversarial_weight", type=float, default=0.1, help="0 leaves the discriminator out")
    group = parser.add_argument_group("losses of a mask VAE")
    group.add_argument("--cross_entropy_weight", type=float, default=1.0)
    group.add_argument("--dice_weight", type=float, default=1.0, help="of 1 - Dice, in which all classes count alike")
    group.add_argument(
        "--class_balance",
        type=float,
        default=0.5,
        help="a voxel's weight in the cross-entropy is the size of its class to minus this: 0 to weigh voxels alike, "
        "1 classes",
    )
    return parser


def load_vae(args: argparse.Namespace) -> AutoencoderKLMaisi:
    """
    The VAE to train, in float32.

    Raises:
        ValueError: if none is given, or both an existing one and the config of a new one.
    """
    if (args.vae_model_name_or_path is None) == (args.vae_config_name_or_path is None):
        raise ValueError("give either --vae_model_name_or_path or, for a new VAE, --vae_config_name_or_path")
    if args.vae_model_name_or_path is not None:
        return AutoencoderKLMaisi.from_pretrained(args.vae_model_name_or_path, cache_dir=args.cache_dir)
    config = AutoencoderKLMaisi.load_config(args.vae_config_name_or_path, cache_dir=args.cache_dir)
    vae = AutoencoderKLMaisi.from_config(config)
    # Sure of its latents at first: noise as large as they are would long hide what is in them.
    log_variance = vae.config.latent_channels
    torch.nn.init.zeros_(vae.quant_conv.weight.data[log_variance:])
    torch.nn.init.constant_(vae.quant_conv.bias.data[log_variance:], -6.0)
    return vae


def load_discriminator(args: argparse.Namespace) -> MaisiPatchDiscriminator:
    """The discriminator to train with, in float32."""
    source = args.discriminator_model_name_or_path
    if source is None:
        return MaisiPatchDiscriminator()
    return MaisiPatchDiscriminator.from_pretrained(source, cache_dir=args.cache_dir)


def train(args: argparse.Namespace) -> None:
    """
    Train and save.

    Raises:
        OSError, ValueError: before any step, for what is missing or contradicts; later see [`Trainer.fit`].
    """
    data_list = read_data_list(args.data_list, args.data_root)
    train_cases, held_out = split_fold(data_list.cases, args.fold)
    patch_size = args.patch_size[0] if len(args.patch_size) == 1 else tuple(args.patch_size)
    accelerator = make_accelerator(args)
    if is_sharded(accelerator):
        raise ValueError(
            "a VAE and its discriminator are trained whole, without FSDP or DeepSpeed: launch with ddp.yaml"
        )
    if not held_out:
        logger.info("all cases are of one fold: all are for training, none for validation")

    # 1. Networks
    vae = load_vae(args).train()
    vae.to(memory_format=torch.channels_last_3d)  # a step takes a fifth less time, in bfloat16 on the CPU
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    kind = objective_class(vae.config)
    networks = [Reconstruction(vae)]
    perceptual = None
    if kind is LabelObjective:
        if args.discriminator_model_name_or_path is not None:
            raise ValueError("a mask VAE has no discriminator: leave --discriminator_model_name_or_path out")
        check_mask_labels(data_list.label_names.values(), f"data list {str(args.data_list)!r}")
    else:
        if args.adversarial_weight:
            networks.append(load_discriminator(args).train())
        if args.perceptual_weight:
            perceptual = load_perceptual_loss(args.perceptual_network).to(accelerator.device)

    # 2. Data, optimisers
    dataset = kind.dataset_class(
        train_cases, patch_size, args.augmentation, args.seed, args.patches_per_case, args.cached_cases
    )
    validation_set = kind.dataset_class(held_out, patch_size, "none")
    dataloader = torch.utils.data.DataLoader(
        dataset, args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    optimizers = [make_optimizer(network.parameters(), args) for network in networks]
    dataloader, *prepared = accelerator.prepare(dataloader, *networks, *optimizers)
    networks, optimizers = prepared[: len(networks)], prepared[len(networks) :]
    model, discriminator = networks if len(networks) == 2 else (networks[0], None)
    item_cases = [case for case in train_cases for _ in range(args.patches_per_case)]
    trainer = Trainer(accelerator, args, dataloader, item_cases, networks)
    lr_schedulers = [
        accelerator.prepare(make_lr_scheduler(one, args, trainer.max_train_steps, accelerator.num_processes))
        for one in optimizers
    ]

    # 3. Steps
    def draws(batch: dict, purpose: str) -> list[torch.Generator]:
        return [case_generator(args.seed, trainer.epoch, index, purpose) for index in batch["index"].tolist()]

    if kind is LabelObjective:
        objective = LabelObjective(args.cross_entropy_weight, args.dice_weight, args.class_balance)
    else:
        unwrapped = None if discriminator is None else accelerator.unwrap_model(discriminator)
        objective = ImageObjective(
            args.reconstruction_loss, args.perceptual_weight, perceptual, args.adversarial_weight, unwrapped, draws
        )
    weights = objective.weights | {"kl_loss": args.kl_weight}

    def train_step(batch: dict) -> dict[str, torch.Tensor]:
        reconstruction, mean, logvar = model(objective.vae_input(batch), draws(batch, "posterior"))
        losses = objective.losses(batch, reconstruction.float()) | {"kl_loss": kl_loss(mean, logvar)}
        loss = sum(weights[name] * value for name, value in losses.items())
        trainer.update(loss, model.parameters(), optimizers[0], lr_schedulers[0])

        if discriminator is not None:
            fake, real = discriminator(torch.cat([reconstruction.detach(), batch["image"]])).float().chunk(2)
            discriminator_loss = (adversarial_loss(fake, is_real=False) + adversarial_loss(real, is_real=True)) / 2
            trainer.update(discriminator_loss, discriminator.parameters(), optimizers[1], lr_schedulers[1])
            losses["discriminator_loss"] = discriminator_loss
        return {"loss": loss, **losses}

    @torch.no_grad()
    def validate(step: int) -> dict[str, float]:
        metrics = []
        for i in range(len(validation_set)):
            batch = {name: value[None].to(accelerator.device) for name, value in validation_set[i].items()}
            metrics.append(objective.metrics(batch, vae(objective.vae_input(batch), return_dict=False)[0].float()))
        return {f"validation_{name}": torch.stack([one[name] for one in metrics]).mean().item() for name in metrics[0]}

    def save_networks(folder: Path) -> None:
        save_trained(accelerator, model, lambda model: model.vae.save_pretrained(folder))
        if discriminator is not None:
            save_trained(accelerator, discriminator, lambda model: model.save_pretrained(folder / "discriminator"))

    def save_model(checkpoint: Path) -> None:
        save_networks(checkpoint / "vae")

    trainer.fit(train_step, save_model, validate if held_out else None)

    # 4. Results
    with write_files_atomically(args.output_dir) as temporary:
        save_networks(temporary)
    if accelerator.is_main_process:
        description = (
            f"A VAE of MAISI, trained for {trainer.global_step} steps on {len(train_cases)} {kind.of}. Load it "
            "with `AutoencoderKLMaisi.from_pretrained`, encode a data set with `scripts/encode_latents.py --vae`."
        )
        write_model_card(Path(args.output_dir), args.vae_model_name_or_path, description, ["vae"])
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(train, parse_args(make_parser()))
