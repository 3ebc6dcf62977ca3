"""What every training script does before and after its loop."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, LoggerType, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCardData, create_repo, upload_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import write_atomically
from ..memory import is_out_of_memory
from .processes import runs_on_cpu

EMA_FILE = "ema.safetensors"


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a run; batches of two processes are together those of one with the doubled batch."""
    if args.report_to != "none" and LoggerType(args.report_to) not in get_available_trackers():
        name = args.report_to
        raise ImportError(f"--report_to {name} needs {name}: pip install {name}, or leave it out")
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        cpu=runs_on_cpu(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed)
    return accelerator


def make_ema(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter], decay: float) -> EMAModel:
    """
    Running averages of weights, which the accelerator's checkpoints have as `ema.safetensors`.

    [`Accelerator.register_for_checkpointing`] would write a pickle, and leave on the CPU what it reads.
    """
    ema = EMAModel(parameters, decay=decay)
    ema.to(accelerator.device)

    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            averages = {str(i): average for i, average in enumerate(ema.shadow_params)}
            save_file({"steps": torch.tensor(ema.optimization_step), **averages}, Path(folder, EMA_FILE))

    def load(models: list, folder: str) -> None:
        averages = load_file(Path(folder, EMA_FILE), device=str(accelerator.device))
        ema.optimization_step = averages.pop("steps").item()
        ema.shadow_params = [averages[str(i)] for i in range(len(averages))]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return ema


@contextmanager
def averaged(ema: EMAModel | None, trained: list[torch.nn.Parameter]) -> Iterator[None]:
    """The averages in the place of the trained weights, meanwhile; without averages, the weights as they are."""
    if ema is None:
        yield
        return
    ema.store(trained)
    ema.copy_to(trained)
    try:
        yield
    finally:
        ema.restore(trained)


def save_trained(accelerator: Accelerator, model: torch.nn.Module, save: Callable[[torch.nn.Module], None]) -> None:
    """
    Gather a wrapped model, sharded or not, and have `save` write it from the main process; called on every process.

    Args:
        accelerator: has prepared the model.
        model: the model as it was prepared.
        save: writes the unwrapped model.
    """
    unwrapped = accelerator.unwrap_model(model)
    if is_sharded(accelerator):
        weights = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            whole = type(unwrapped).from_config(unwrapped.config)
            whole.load_state_dict(weights)
            save(whole)
    elif accelerator.is_main_process:
        save(unwrapped)
    accelerator.wait_for_everyone()


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are spread over processes."""
    return accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")


def write_model_card(folder: Path, base_model: str | None, description: str, tags: list[str]) -> None:
    """A README.md that says what the model is, what it was made from, and that what it makes is synthetic."""
    data = ModelCardData(
        library_name="diffusers",
        base_model=None if base_model is None or Path(base_model).exists() else base_model,
        tags=["maisi", "medical", "3d", "synthetic", "diffusers-training", *tags],
    )
    with write_atomically(folder / "README.md") as temporary:
        temporary.write_text(f"---\n{data.to_yaml()}\n---\n\n# {folder.resolve().name}\n\n{description}\n")


def push_to_hub(args: argparse.Namespace) -> None:
    """
    Upload what a run made, without its checkpoints, its arguments, and what is of the data it was made from.

    Raises:
        OSError: if the Hub refuses or cannot be reached; what was written stays.
    """
    output_dir = Path(args.output_dir)
    name = args.hub_model_id or output_dir.resolve().name
    try:
        repo_id = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            token=args.hub_token,
            commit_message="End of training",
            # Pictures and numbers of validation are of held-out patients, and have their files' names.
            ignore_patterns=[
                "checkpoint-*/**",
                "abandoned-*/**",
                "validation/**",
                "log.jsonl",
                "args.json",
                ".*",
                f"{args.logging_dir}/**",
            ],
        )
    except Exception as error:  # of the network, the Hub or the login: none touches what was written
        raise OSError(f"{output_dir} is complete, but not uploaded to {name}: {error}") from error


def run_script(train: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Train, or say in one line on stderr why not and exit with code 1."""
    logging.basicConfig(format="%(message)s")
    for name in ("__main__", __package__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        train(args)
    except (OSError, ValueError, ImportError, FloatingPointError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        message = str(error)
        if "\nOriginal Traceback" in message:  # from a worker of the data loader; its last line says what was wrong
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {' '.join(message.split())}")
