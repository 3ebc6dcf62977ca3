"""The loop that all training scripts share: epochs, resuming, checkpoints, logs, the stop at a loss of NaN."""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from ..files import write_atomically
from .checkpoints import checkpoint_step, find_checkpoint, list_checkpoints, save_checkpoint, set_aside_later
from .data_list import Case
from .trackers import JSONLinesTracker

logger = get_logger(__name__)

# What decides which cases a step sees: with another value, a resumed run goes on differently.
_ORDER = (
    "data_list",
    "fold",
    "train_batch_size",
    "patches_per_case",
    "gradient_accumulation_steps",
    "seed",
    "num_processes",
)
SETTINGS = "args.json"


def settings_before(args: argparse.Namespace) -> dict:
    """The arguments of the run that these resume; empty where there is none."""
    is_resumed = args.resume_from_checkpoint and list_checkpoints(args.output_dir)
    return json.loads(Path(args.output_dir, SETTINGS).read_text()) if is_resumed else {}


class Trainer:
    """
    Runs a training script's steps.

    Args:
        accelerator: has prepared the data loader, models, optimisers and schedulers.
        args: the script's arguments, those of [`maisi_diffusers.training.arguments`].
        dataloader: batches with an `"index"` into the cases.
        cases: name the files of a batch.
        models: what gradients are accumulated for.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: argparse.Namespace,
        dataloader: torch.utils.data.DataLoader,
        cases: list[Case],
        models: list[torch.nn.Module],
    ):
        self.accelerator = accelerator
        self.args = args
        self.dataloader = dataloader
        self.cases = cases
        self.models = models
        self.output_dir = Path(args.output_dir)
        self.updates_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
        self.max_train_steps = args.max_train_steps or args.num_train_epochs * self.updates_per_epoch
        self.global_step = 0
        self.epoch = 0
        self._batch = None

    def fit(
        self,
        train_step: Callable[[dict], dict[str, torch.Tensor]],
        save_model: Callable[[Path], None],
        validate: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        """
        Train until `max_train_steps`.

        Args:
            train_step: computes the losses of a batch, and calls [`update`] with each that is optimised; returns what
                to log.
            save_model: writes the model into a folder; called on every process.
            validate: called with the step every `validation_steps`; returns what to log.

        Raises:
            FloatingPointError: if a loss or a gradient is not finite: with the step, the files of the batch and the
                last complete checkpoint. No weight has changed by it.
            OSError: if a checkpoint cannot be written.
        """
        accelerator, args = self.accelerator, self.args
        self._resume()
        self._start_trackers()
        progress = tqdm(
            initial=self.global_step,
            total=self.max_train_steps,
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        logs = []
        while self.global_step < self.max_train_steps:
            self.epoch, updates = divmod(self.global_step, self.updates_per_epoch)
            for batch in self._batches(updates * args.gradient_accumulation_steps):
                self._batch = batch
                with accelerator.accumulate(*self.models):
                    logs.append(train_step(batch))
                if not accelerator.sync_gradients:
                    continue
                self.global_step += 1
                values = self._mean(logs)
                logs = []
                accelerator.log(values, step=self.global_step)
                progress.update()
                progress.set_postfix(**values)
                if args.validation_steps and validate is not None and self.global_step % args.validation_steps == 0:
                    accelerator.log(validate(self.global_step), step=self.global_step)
                if self.global_step % args.checkpointing_steps == 0:
                    save_checkpoint(
                        accelerator, self.output_dir, self.global_step, save_model, args.checkpoints_total_limit
                    )
                if self.global_step == self.max_train_steps:
                    break
        progress.close()

    def update(
        self,
        loss: torch.Tensor,
        parameters: Iterable[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """Backward, clip, step: changes the parameters, of prepared models, when gradients have been accumulated."""
        accelerator = self.accelerator
        self._check_finite(loss, "loss")
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm or math.inf)
            if accelerator.scaler is None and norm is not None:  # a scaler passes over such steps by itself
                self._check_finite(norm, "norm of the gradients")
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    def _check_finite(self, value: torch.Tensor, what: str) -> None:
        # The mean over processes, so that all stop.
        if torch.isfinite(self.accelerator.reduce(value.detach().float(), "mean")):
            return
        if torch.isfinite(value):
            where = "another process"
        else:
            where = ", ".join(str(self.cases[i].image) for i in self._batch["index"].tolist())
        complete = list_checkpoints(self.output_dir)
        last = f"the last good checkpoint is {complete[-1]}" if complete else "there is no checkpoint yet"
        raise FloatingPointError(
            f"step {self.global_step + 1}: the {what} is {value.item()}, with {where}; {last}: look at these files, "
            "or try a lower --learning_rate or --max_grad_norm 1"
        )

    def _resume(self) -> None:
        args, accelerator = self.args, self.accelerator
        settings, before = self._settings(), settings_before(args)
        path = self.output_dir / SETTINGS
        checkpoint = None
        if args.resume_from_checkpoint:
            checkpoint = find_checkpoint(self.output_dir, args.resume_from_checkpoint)
            if checkpoint is None:
                logger.warning(f"{self.output_dir} has no checkpoint to resume from: starting anew")
        elif list_checkpoints(self.output_dir):
            raise ValueError(
                f"output_dir={str(self.output_dir)!r} has checkpoints of another run: add --resume_from_checkpoint "
                "latest to go on with it, or give another folder"
            )
        if checkpoint is not None:
            if before.get("use_ema") and not settings.get("use_ema"):
                raise ValueError(f"{checkpoint} has averaged weights, which would be lost: add --use_ema")
            for name in _ORDER:
                if name in settings and before.get(name) != settings[name]:
                    logger.warning(
                        f"{name} was {before.get(name)} and is {settings[name]}: the run goes on with other batches "
                        "than it would have had"
                    )
            given = [
                [{name: group[name] for name in group if name not in ("params", "lr")} for group in one.param_groups]
                for one in accelerator._optimizers
            ]
            try:
                accelerator.load_state(str(checkpoint))
            except (RuntimeError, ValueError, FileNotFoundError) as error:  # other weights, or files of another option
                reason = " ".join(str(error).split())[:150]
                raise ValueError(
                    f"{checkpoint} is not of a run with these options ({reason}): give those that {path} has, or "
                    "another output_dir"
                ) from error
            self._set_options(given)
            self.global_step = checkpoint_step(checkpoint)
            logger.info(f"resumed from {checkpoint}")
            if accelerator.is_main_process:
                set_aside_later(self.output_dir, checkpoint)
        if accelerator.is_main_process:
            with write_atomically(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n")

    def _set_options(self, given: list[list[dict]]) -> None:
        """Options of the optimisers as they are given now, and the learning rates that follow; a checkpoint
        has brought its own."""
        for optimizer, groups in zip(self.accelerator._optimizers, given):
            for group, options in zip(optimizer.param_groups, groups):
                group.update(options)
        for wrapped in self.accelerator._schedulers:
            scheduler = wrapped.scheduler
            groups = scheduler.optimizer.param_groups
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas):
                group["lr"] = base * factor(scheduler.last_epoch)

    def _settings(self) -> dict:
        """The arguments to write down: all but the secret one."""
        given = {name: str(v) if isinstance(v, Path) else v for name, v in sorted(vars(self.args).items())}
        del given["hub_token"]
        return {**given, "num_processes": self.accelerator.num_processes}

    def _start_trackers(self) -> None:
        self.accelerator.log_with.append(JSONLinesTracker(self.output_dir, self.global_step))
        plain = (int, float, str, bool)
        config = {name: v if isinstance(v, plain) else str(v) for name, v in self._settings().items() if v is not None}
        self.accelerator.init_trackers(self.args.tracker_project_name, config)

    def _batches(self, first_batch: int) -> torch.utils.data.DataLoader:
        self.dataloader.set_epoch(self.epoch)
        # accelerate passes it on to the dataset where there is one process only.
        self.dataloader.dataset.set_epoch(self.epoch)
        return skip_first_batches(self.dataloader, first_batch) if first_batch else self.dataloader

    def _mean(self, logs: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means over the accumulated batches and the processes."""
        names = list(logs[0])
        values = torch.stack([torch.stack([log[name].detach().float() for name in names]) for log in logs]).mean(0)
        return dict(zip(names, self.accelerator.reduce(values, "mean").tolist()))
