r"""
Train the image VAE of MAISI on patches of CT or MR volumes: go on with a model's own, or train a new one.

Example:

```bash
accelerate launch scripts/train_vae.py --vae_model_name_or_path maisi-rflow-ct/vae --data_list dataset.json \
    --output_dir vae --patch_size 64
accelerate launch scripts/train_vae.py --vae_model_name_or_path vae \
    --discriminator_model_name_or_path vae/discriminator --data_list dataset.json --output_dir vae-128 --patch_size 128
```
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from diffusers.utils.torch_utils import randn_tensor

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.training.arguments import add_optimizer_arguments, add_run_arguments, parse_args
from maisi_diffusers.training.data_list import read_data_list, split_fold
from maisi_diffusers.training.discriminator import MaisiPatchDiscriminator
from maisi_diffusers.training.files import write_files_atomically
from maisi_diffusers.training.loop import Trainer
from maisi_diffusers.training.optimizers import make_lr_scheduler, make_optimizer
from maisi_diffusers.training.patches import PatchDataset
from maisi_diffusers.training.perceptual import load_perceptual_loss
from maisi_diffusers.training.randomness import case_generator
from maisi_diffusers.training.run import make_accelerator, push_to_hub, run_script, save_trained, write_model_card
from maisi_diffusers.training.vae_losses import adversarial_loss, kl_loss

logger = get_logger(__name__)


class Reconstruction(torch.nn.Module):
    """The VAE with all that its losses need in one `forward`, so that it can be wrapped for distributed training."""

    def __init__(self, vae: AutoencoderKLMaisi):
        super().__init__()
        self.vae = vae

    def forward(
        self, image: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, 1, X, Y, Z) -> reconstruction from a draw, and mean and log-variance (N, C, X/4, Y/4, Z/4)."""
        posterior = self.vae.encode(image).latent_dist
        noise = randn_tensor(posterior.mean.shape, generator=generators, device=image.device, dtype=image.dtype)
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
        return reconstruction, posterior.mean, posterior.logvar


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description="Train the image VAE of MAISI.")
    group = parser.add_argument_group("model")
    group.add_argument("--vae_model_name_or_path", help="VAE to go on with: a folder or a Hub id")
    group.add_argument("--vae_config_name_or_path", help="train a new VAE with this config: a JSON file or folder")
    group.add_argument(
        "--discriminator_model_name_or_path", help="discriminator to go on with; a new one if not given"
    )
    group.add_argument("--cache_dir", help="folder for models from the Hub")
    add_run_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=1e-4, lr_scheduler="constant_with_warmup", weight_decay=None)
    group = parser.add_argument_group("patches")
    group.add_argument("--patch_size", type=int, nargs="+", default=[64], help="voxels, one number or three")
    group.add_argument("--patches_per_case", type=int, default=1, help="patches of a volume to an epoch")
    group.add_argument("--cached_cases", type=int, default=0, help="volumes to keep in memory")
    group.add_argument("--no_augmentation", action="store_true", help="the middle of each volume, as it is")
    group = parser.add_argument_group("losses")
    group.add_argument("--perceptual_weight", type=float, default=0.3, help="0 needs no pretrained network")
    group.add_argument("--perceptual_network", choices=["squeeze", "alex", "vgg"], default="squeeze")
    group.add_argument("--kl_weight", type=float, default=1e-7)
    group.add_argument("--adversarial_weight", type=float, default=0.1, help="0 leaves the discriminator out")
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
    return AutoencoderKLMaisi.from_config(config)


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
    if not held_out:
        logger.info("all cases are of one fold: all are for training, none for validation")

    # 1. Networks
    vae = load_vae(args).train()
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    discriminator = load_discriminator(args).train()
    perceptual = None
    if args.perceptual_weight:
        perceptual = load_perceptual_loss(args.perceptual_network).to(accelerator.device)

    # 2. Data, optimisers
    dataset = PatchDataset(
        train_cases, patch_size, not args.no_augmentation, args.seed, args.patches_per_case, args.cached_cases
    )
    validation_set = PatchDataset(held_out, patch_size, augment=False)
    dataloader = torch.utils.data.DataLoader(
        dataset, args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    optimizer = make_optimizer(vae.parameters(), args)
    discriminator_optimizer = make_optimizer(discriminator.parameters(), args)
    model, discriminator, optimizer, discriminator_optimizer, dataloader = accelerator.prepare(
        Reconstruction(vae), discriminator, optimizer, discriminator_optimizer, dataloader
    )
    frozen_discriminator = accelerator.unwrap_model(discriminator)
    item_cases = [case for case in train_cases for _ in range(args.patches_per_case)]
    trainer = Trainer(accelerator, args, dataloader, item_cases, [model, discriminator])
    lr_scheduler, discriminator_lr_scheduler = accelerator.prepare(
        *(
            make_lr_scheduler(one, args, trainer.max_train_steps, accelerator.num_processes)
            for one in (optimizer, discriminator_optimizer)
        )
    )

    # 3. Steps
    def draws(batch: dict, purpose: str) -> list[torch.Generator]:
        return [case_generator(args.seed, trainer.epoch, index, purpose) for index in batch["index"].tolist()]

    def train_step(batch: dict) -> dict[str, torch.Tensor]:
        image = batch["image"]
        reconstruction, mean, logvar = model(image, draws(batch, "posterior"))
        reconstruction = reconstruction.float()
        losses = {
            "reconstruction_loss": F.l1_loss(reconstruction, image),
            "kl_loss": kl_loss(mean.float(), logvar.float()),
        }
        loss = losses["reconstruction_loss"] + args.kl_weight * losses["kl_loss"]
        if perceptual is not None:
            losses["perceptual_loss"] = perceptual(reconstruction, image, draws(batch, "perceptual"))
            loss = loss + args.perceptual_weight * losses["perceptual_loss"]
        if args.adversarial_weight:
            # Unwrapped and frozen: its own gradients are not for this step.
            frozen_discriminator.requires_grad_(False)
            losses["adversarial_loss"] = adversarial_loss(frozen_discriminator(reconstruction), is_real=True)
            frozen_discriminator.requires_grad_(True)
            loss = loss + args.adversarial_weight * losses["adversarial_loss"]
        trainer.update(loss, model, optimizer, lr_scheduler)

        if args.adversarial_weight:
            fake, real = discriminator(torch.cat([reconstruction.detach(), image])).float().chunk(2)
            discriminator_loss = (adversarial_loss(fake, is_real=False) + adversarial_loss(real, is_real=True)) / 2
            trainer.update(discriminator_loss, discriminator, discriminator_optimizer, discriminator_lr_scheduler)
            losses["discriminator_loss"] = discriminator_loss
        return {"loss": loss, **losses}

    @torch.no_grad()
    def validate(step: int) -> dict[str, float]:
        errors = []
        for i in range(len(validation_set)):
            image = validation_set[i]["image"][None].to(accelerator.device)
            errors.append((vae(image, return_dict=False)[0].float() - image)[0])
        l1 = torch.stack([error.abs().mean() for error in errors]).mean()
        psnr = torch.stack([-10 * error.square().mean().log10() for error in errors]).mean()
        return {"validation_l1": l1.item(), "validation_psnr": psnr.item()}

    def save_networks(folder: Path) -> None:
        save_trained(accelerator, model, None, lambda model: model.vae.save_pretrained(folder))
        if args.adversarial_weight:
            save_trained(
                accelerator, discriminator, None, lambda model: model.save_pretrained(folder / "discriminator")
            )

    def save_model(checkpoint: Path) -> None:
        save_networks(checkpoint / "vae")

    trainer.fit(train_step, save_model, validate if held_out else None)

    # 4. Results
    with write_files_atomically(args.output_dir) as temporary:
        save_networks(temporary)
    if accelerator.is_main_process:
        description = (
            f"A VAE of MAISI, trained for {trainer.global_step} steps on {len(train_cases)} volumes. Load it with "
            "`AutoencoderKLMaisi.from_pretrained`, encode a data set with `scripts/encode_latents.py --vae`."
        )
        write_model_card(Path(args.output_dir), args.vae_model_name_or_path, description, ["vae"])
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(train, parse_args(make_parser()))
