"""Checkpoints of a run: `checkpoint-<step>` folders that `accelerate` writes and reads, whole or not at all."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from ..files import publish, remove

_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The number of optimisation steps before a checkpoint."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def find_checkpoint(output_dir: str | os.PathLike, name: str) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        output_dir: the run's folder.
        name: `"latest"`, or the name or path of one.

    Returns:
        its path; `None` if the latest is asked for and there is none.

    Raises:
        FileNotFoundError: if there is no such checkpoint; the existing ones are named.
    """
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        return checkpoints[-1] if checkpoints else None
    for checkpoint in checkpoints:
        if Path(name) == Path(checkpoint.name) or Path(name).resolve() == checkpoint.resolve():
            return checkpoint
    existing = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
    raise FileNotFoundError(
        f"{str(output_dir)!r} has no checkpoint {name!r}: it has {existing}; give one of them, or 'latest'"
    )


def set_aside_later(output_dir: str | os.PathLike, checkpoint: Path) -> None:
    """
    Rename the checkpoints after the one that a run goes on from to `abandoned-<step>`: they are of another run now,
    which "latest" is not to find. Those of an abandoned run before are removed.
    """
    for later in list_checkpoints(output_dir):
        if checkpoint_step(later) > checkpoint_step(checkpoint):
            aside = later.with_name(f"abandoned-{checkpoint_step(later)}")
            remove(aside)
            os.replace(later, aside)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike,
    step: int,
    save_model: Callable[[Path], None],
    total_limit: int | None = None,
) -> Path:
    """
    Write `checkpoint-<step>`: the state to resume from, and the model as it is then, to use.

    It is written under a name that [`list_checkpoints`] passes over and renamed when complete and on disk; only then
    are older ones removed.

    Args:
        accelerator: with everything prepared and registered that the state consists of.
        output_dir: the run's folder.
        step: optimisation steps so far.
        save_model: writes the model into a folder; called on every process.
        total_limit: checkpoints to keep, this one included.

    Raises:
        OSError: if it cannot be written; nothing is left of it, and the last complete one is named.
    """
    output_dir = Path(output_dir)
    checkpoint = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}"
    if accelerator.is_main_process:
        for leftover in list(output_dir.glob(".checkpoint-*")):  # of a run that was killed
            remove(leftover)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        save_model(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            publish(temporary, checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        remove(temporary)
        complete = list_checkpoints(output_dir)
        last = f"the last complete checkpoint is {complete[-1].name}" if complete else "there is none before it"
        reason = " ".join(str(error).split())
        raise OSError(
            f"{checkpoint.name} cannot be written to {str(output_dir)!r} ({reason}); {last}: make room, then go on "
            "with --resume_from_checkpoint latest"
        ) from error
    if accelerator.is_main_process and total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            remove(old)
    accelerator.wait_for_everyone()
    return checkpoint
