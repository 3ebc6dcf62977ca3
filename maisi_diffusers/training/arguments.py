"""Arguments that the training scripts share; their names are those of diffusers' examples where these have them."""

import argparse
import json
from pathlib import Path

import yaml

from .losses import LOSS_TYPES


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a run's data come from and its results go, how long it is and how it is written down."""
    group = parser.add_argument_group("data and output")
    group.add_argument(
        "--config", type=Path, help="YAML or JSON file with any of these options; the command line wins"
    )
    group.add_argument("--data_list", type=Path, required=True, help="JSON data list")
    group.add_argument("--data_root", type=Path, help="folder that paths in the list are relative to; the list's own")
    group.add_argument("--fold", type=int, default=0, help="fold that is for validation; the others are for training")
    group.add_argument("--output_dir", type=Path, required=True, help="folder for the model and the checkpoints")
    group.add_argument("--seed", type=int, default=0, help="of the order of the cases and of every draw")
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that load data")
    group.add_argument("--push_to_hub", action="store_true", help="upload the model when done")
    group.add_argument("--hub_model_id", help="repository to upload to; the name of output_dir if not given")
    group.add_argument("--hub_token", help="token to upload with; the stored login if not given")

    group = parser.add_argument_group("run")
    group.add_argument("--train_batch_size", type=int, default=1, help="cases a process and step")
    group.add_argument("--num_train_epochs", type=int, default=100)
    group.add_argument("--max_train_steps", type=int, help="optimisation steps; overrides num_train_epochs")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches an optimisation step")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="accelerate's setting if not given")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="write a checkpoint every so many steps")
    group.add_argument("--checkpoints_total_limit", type=int, help="checkpoints to keep; all if not given")
    group.add_argument("--resume_from_checkpoint", help="'latest', or the name of a checkpoint")
    group.add_argument("--validation_steps", type=int, help="validate every so many steps; never if not given")
    group.add_argument("--report_to", choices=["none", "tensorboard", "wandb"], default="none", help="tracker")
    group.add_argument("--logging_dir", default="logs", help="folder of the tracker, in output_dir")
    group.add_argument("--tracker_project_name", default="maisi", help="name of the project in the tracker")


def add_optimizer_arguments(
    parser: argparse.ArgumentParser, learning_rate: float, lr_scheduler: str, weight_decay: float | None
) -> None:
    """Optimiser and learning rate; `weight_decay=None` is for scripts that train with Adam instead of AdamW."""
    group = parser.add_argument_group("optimiser")
    group.add_argument("--learning_rate", type=float, default=learning_rate)
    group.add_argument(
        "--lr_scheduler",
        choices=["polynomial", "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup"],
        default=lr_scheduler,
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--lr_num_cycles", type=int, default=1, help="of cosine_with_restarts")
    group.add_argument("--lr_power", type=float, default=2.0, help="of polynomial, which ends at 0")
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    if weight_decay is not None:
        group.add_argument("--adam_weight_decay", type=float, default=weight_decay)
    group.add_argument("--use_8bit_adam", action="store_true", help="8-bit optimiser states, from bitsandbytes")
    group.add_argument(
        "--max_grad_norm", type=float, help="clip gradients to this norm; not if not given, as published"
    )


def add_loss_arguments(group: argparse._ArgumentGroup, if_not_given: str) -> None:
    """Add the options that both diffusion networks have; `if_not_given` says which labels weigh more then."""
    group.add_argument(
        "--loss_type",
        choices=LOSS_TYPES,
        default="l1",
        help="l1: as published; l2: the mean square, whose best prediction is the mean, which sampling takes it for, "
        "and not the median: matters where a model is small or little trained",
    )
    group.add_argument(
        "--weighted_loss", type=float, default=100.0, help="weight of the voxels of weighted_loss_label"
    )
    group.add_argument(
        "--weighted_loss_label", type=int, nargs="*", help=f"labels that weigh more; {if_not_given} if not given"
    )


def parse_args(parser: argparse.ArgumentParser, input_args: list[str] | None = None) -> argparse.Namespace:
    """
    Parse a command line, or a list of arguments instead, with what its `--config` file holds before it.

    Values out of range end as argparse's errors do: one line, exit code 2.
    """
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--config", type=Path)
    known, remaining = finder.parse_known_args(input_args)
    from_file = [] if known.config is None else _read_config(parser, known.config)
    args = parser.parse_args(from_file + remaining)
    args.config = known.config
    at_least_1 = (
        "train_batch_size",
        "num_train_epochs",
        "max_train_steps",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
    )
    for name in at_least_1:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name}: {value} is not allowed, give 1 or more")
    for name in ("learning_rate", "max_grad_norm"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"argument --{name}: {value} is not allowed, give more than 0")
    return args


def _read_config(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The options of a file as a command line, so that they are checked like one."""
    if not path.is_file():
        parser.error(f"argument --config: {str(path)!r} does not exist")
    try:
        text = path.read_text()
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        parser.error(f"argument --config: {str(path)!r} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"argument --config: {str(path)!r} must hold names and values")
    actions = {action.dest: action for action in parser._actions}
    line = []
    for name, value in options.items():
        if name not in actions or name in ("config", "help"):
            parser.error(f"argument --config: {str(path)!r} has an option {name!r} that does not exist")
        if value is None or value is False:
            continue
        line.append(f"--{name}")
        if value is not True:
            line += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return line
