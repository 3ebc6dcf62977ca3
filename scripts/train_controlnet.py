r"""
Train the ControlNet of MAISI: fine-tune it to a new class, or train one from the UNet, or both together.

Example:

```bash
accelerate launch scripts/train_controlnet.py --pretrained_model_name_or_path maisi-rflow-ct \
    --data_list latents/latents.json --output_dir kidney-tumor --weighted_loss 100 --max_train_steps 2000
accelerate launch scripts/train_controlnet.py --pretrained_model_name_or_path young-model --train_unet \
    --data_list latents/latents.json --output_dir model --max_train_steps 100000
```
"""

import argparse
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from accelerate.logging import get_logger

from maisi_diffusers import MaisiControlNetModel, MaisiCTPipeline
from maisi_diffusers.files import write_files_atomically
from maisi_diffusers.training.arguments import (
    add_loss_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    parse_args,
)
from maisi_diffusers.training.base_model import add_model_arguments, load_base_model, new_controlnet
from maisi_diffusers.training.data_list import DataList, read_data_list, split_fold
from maisi_diffusers.training.dataset import LatentDataset
from maisi_diffusers.training.loop import Trainer
from maisi_diffusers.training.objectives import ControlNetObjective, DiffusionObjective
from maisi_diffusers.training.optimizers import make_lr_scheduler, make_optimizer
from maisi_diffusers.training.preflight import check_training_cases
from maisi_diffusers.training.randomness import case_generator
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
from maisi_diffusers.training.validation import log_pictures, mean_loss, sample_cases

logger = get_logger(__name__)

# What the frozen UNet computes in.
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Attention and 3x3x3 convolutions of the encoder, and the embedding of the label map, where a new class enters.
LORA_TARGETS = r"(.*\.)?(to_q|to_k|to_v|conv1|conv2)|controlnet_cond_embedding\.(conv_in|blocks\.\d+|conv_out)"


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description="Train the ControlNet of MAISI.")
    add_model_arguments(parser)
    parser.add_argument(
        "--controlnet_model_name_or_path",
        help="ControlNet to start from: a folder, a Hub id, or 'unet' for a new one from the UNet; the model's own if "
        "not given, and if it has none a new one",
    )
    add_run_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=1e-5, lr_scheduler="polynomial", weight_decay=1e-2)
    group = parser.add_argument_group("losses")
    add_loss_arguments(group, "the data list's new classes")
    group.add_argument("--use_region_contrastive_loss", action="store_true", help="compare with the tumor-free mask")
    group.add_argument("--region_contrastive_loss_weight", type=float, default=0.01)
    group.add_argument(
        "--region_contrastive_loss_delta", type=float, default=2.0, help="difference it asks for at most"
    )
    group = parser.add_argument_group("what is trained")
    group.add_argument("--use_lora", action="store_true", help="train a small adapter instead of the whole network")
    group.add_argument("--rank", type=int, default=16, help="of the adapter")
    group.add_argument("--lora_alpha", type=int, help="of the adapter; its rank if not given")
    group.add_argument(
        "--train_unet",
        action="store_true",
        help="train the UNet too and save the whole model: for one that is made from nothing, which learns faster so",
    )
    group.add_argument(
        "--controlnet_dropout",
        type=float,
        default=0.4,
        help="share of the steps in which --train_unet trains the UNet alone, so that it needs no label map",
    )
    group.add_argument(
        "--freeze_condition_embedding",
        action="store_true",
        help="keep the embedding of the label map as it is: its gradients are much of a step of a small network",
    )
    group.add_argument(
        "--modality_dropout",
        type=float,
        default=0.0,
        help="share of cases whose modality is dropped to 0, and of those where it becomes its parent, ct or mri",
    )
    group.add_argument("--use_ema", action="store_true", help="save averaged weights")
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group = parser.add_argument_group("validation")
    group.add_argument("--num_validation_images", type=int, default=2, help="held-out label maps to make images of")
    group.add_argument("--validation_num_inference_steps", type=int, help="the model's own number if not given")
    return parser


def load_controlnet(args: argparse.Namespace, pipe: MaisiCTPipeline, data_list: DataList) -> MaisiControlNetModel:
    """The ControlNet to train, in float32, with the data list's new classes."""
    source = args.controlnet_model_name_or_path
    if source is not None and source != "unet":
        controlnet = MaisiControlNetModel.from_pretrained(source, cache_dir=args.cache_dir)
    elif source is None and pipe.controlnet is not None:
        controlnet = pipe.controlnet
    else:
        controlnet = new_controlnet(pipe)
    controlnet.add_classes(data_list.label_names, data_list.tumor_organs)
    controlnet.controlnet_cond_embedding.requires_grad_(not args.freeze_condition_embedding)
    if args.use_lora:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("--use_lora needs peft: pip install peft, or leave it out") from error
        controlnet.requires_grad_(False)
        alpha = args.lora_alpha or args.rank
        controlnet.add_adapter(LoraConfig(r=args.rank, lora_alpha=alpha, target_modules=LORA_TARGETS))
    return controlnet.train()


def save_adapter(controlnet: MaisiControlNetModel, folder: Path) -> None:
    """Write the LoRA adapter, and the config that names its classes."""
    controlnet.save_lora_adapter(folder)
    controlnet.save_config(folder)


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
    if (args.use_ema or args.use_lora or args.train_unet) and is_sharded(accelerator):
        raise ValueError(
            "--use_ema, --use_lora and --train_unet need whole networks, not FSDP or DeepSpeed: leave them out"
        )
    if args.use_lora and args.freeze_condition_embedding:
        raise ValueError("--use_lora has an adapter of the embedding: leave it or --freeze_condition_embedding out")
    if args.use_lora and args.train_unet:
        raise ValueError("--use_lora trains an adapter of the ControlNet alone: leave it or --train_unet out")

    # 1. Networks
    pipe = load_base_model(args)
    pipe.register_modules(controlnet=load_controlnet(args, pipe, data_list))
    check_training_cases(data_list, pipe.unet, pipe.vae.spatial_compression_ratio, args.train_batch_size, True)
    pipe.register_to_config(input_rules=None)  # validation samples on the grids of the data
    pipe.vae.requires_grad_(False).eval()
    pipe.unet.requires_grad_(args.train_unet).train(args.train_unet).to(accelerator.device)
    if accelerator.mixed_precision in HALF and not args.train_unet:
        pipe.unet.to(HALF[accelerator.mixed_precision])
    if args.gradient_checkpointing:
        pipe.controlnet.enable_gradient_checkpointing()
        pipe.unet.enable_gradient_checkpointing()
    networks = (pipe.controlnet, pipe.unet)
    trained = [one for one in chain(*(network.parameters() for network in networks)) if one.requires_grad]
    ema = make_ema(accelerator, trained, args.ema_decay) if args.use_ema else None

    # 2. Data, optimiser
    make_dataset = partial(
        LatentDataset,
        scheduler=pipe.scheduler,
        seed=args.seed,
        with_labels=True,
        tumors=pipe.tumors if args.use_region_contrastive_loss else None,
        latent_channels=pipe.unet.config.in_channels,
    )
    dataloader = torch.utils.data.DataLoader(
        make_dataset(train_cases, modality_dropout=args.modality_dropout),
        args.train_batch_size,
        shuffle=True,
        num_workers=args.dataloader_num_workers,
    )
    optimizer = make_optimizer(trained, args)
    controlnet, optimizer, dataloader = accelerator.prepare(pipe.controlnet, optimizer, dataloader)
    unet = accelerator.prepare(pipe.unet) if args.train_unet else pipe.unet
    models = [controlnet, unet] if args.train_unet else [controlnet]
    trainer = Trainer(accelerator, args, dataloader, train_cases, models)
    lr_scheduler = accelerator.prepare(
        make_lr_scheduler(optimizer, args, trainer.max_train_steps, accelerator.num_processes)
    )

    # 3. Steps
    if args.weighted_loss_label is None:
        args.weighted_loss_label = list(data_list.label_names.values())
    objective = ControlNetObjective(
        controlnet,
        pipe.controlnet.config,
        unet,
        pipe.unet.config,
        pipe.scheduler,
        pipe.vae.config.scaling_factor,
        args.loss_type,
        pipe.vae.spatial_compression_ratio,
        tuple(args.weighted_loss_label),
        args.weighted_loss,
        args.region_contrastive_loss_weight if args.use_region_contrastive_loss else 0.0,
        args.region_contrastive_loss_delta,
        total=accelerator.reduce,
        num_processes=accelerator.num_processes,
    )

    alone = DiffusionObjective(unet, pipe.unet.config, pipe.scheduler, pipe.vae.config.scaling_factor, args.loss_type)

    def is_alone(step: int) -> bool:
        """Whether a step leaves the ControlNet out: the same on all processes."""
        draw = torch.rand((), generator=case_generator(args.seed, 0, step, "controlnet dropout"))
        return args.train_unet and draw.item() < args.controlnet_dropout

    def train_step(batch: dict) -> dict[str, torch.Tensor]:
        if is_alone(trainer.global_step):
            loss = alone(batch)["loss"]
            losses = {"unet_loss": loss}
        else:
            losses = objective(batch)
            loss = losses["loss"]
        trainer.update(loss, chain(*(model.parameters() for model in models)), optimizer, lr_scheduler)
        if ema is not None and accelerator.sync_gradients:
            ema.step(trained)
        return losses

    def validate(step: int) -> dict[str, float]:
        folder = Path(args.output_dir, "validation", f"step-{step}")
        cases = held_out[: args.num_validation_images]
        with averaged(ema, trained):
            loss = mean_loss(objective, make_dataset(held_out), accelerator.device)
            pipe.vae.to(accelerator.device)
            medians = sample_cases(pipe, cases, folder, args.validation_num_inference_steps, args.seed)
            pipe.vae.to("cpu")
        log_pictures(accelerator, folder, step)
        hu = {f"hu/{case}/{organ}": value for case, organs in medians.items() for organ, value in organs.items()}
        return {"validation_loss": loss, **hu}

    save = save_adapter if args.use_lora else MaisiControlNetModel.save_pretrained

    def save_model(checkpoint: Path) -> None:
        with averaged(ema, trained):
            save_trained(accelerator, controlnet, lambda model: save(model, checkpoint / "controlnet"))
            if args.train_unet:
                save_trained(accelerator, unet, lambda model: model.save_pretrained(checkpoint / "unet"))

    trainer.fit(train_step, save_model, validate if held_out else None)

    # 4. Results
    def save_result(model: MaisiControlNetModel) -> None:
        if args.train_unet:
            pipe.save_pretrained(temporary)
        else:
            save(model, temporary)

    with write_files_atomically(args.output_dir) as temporary, averaged(ema, trained):
        save_trained(accelerator, controlnet, save_result)
    if accelerator.is_main_process:
        write_model_card(
            Path(args.output_dir),
            args.pretrained_model_name_or_path,
            describe(args, pipe, len(train_cases)),
            ["controlnet"],
        )
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


def describe(args: argparse.Namespace, pipe: MaisiCTPipeline, num_cases: int) -> str:
    """What the model card says."""
    classes = ", ".join(f"{name} ({label})" for name, label in (pipe.controlnet.config.label_names or {}).items())
    base, place = args.pretrained_model_name_or_path, args.output_dir
    if args.push_to_hub:  # where folders of this machine mean nothing
        base = Path(base).resolve().name if Path(base).exists() else base
        place = args.hub_model_id or Path(place).resolve().name
    load = (
        f'pipe.load_lora_weights("{place}")' if args.use_lora else f'MaisiControlNetModel.from_pretrained("{place}")'
    )
    return (
        f"A ControlNet of MAISI{' (LoRA adapter)' if args.use_lora else ''}, trained from {base} "
        f"on {num_cases} cases. New classes: {classes or 'none'}. Load it with "
        f"`{load}`. The images it makes are synthetic: they are not for diagnosis."
    )


if __name__ == "__main__":
    run_script(train, parse_args(make_parser()))
