"""Optimisers and learning-rate schedules from a script's arguments."""

import argparse
from collections.abc import Iterable

import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

# Devices besides the CPU that torch has one-pass optimisers for: less time, and no copies in between.
FUSED = ("cuda", "xpu", "mps")


def make_optimizer(parameters: Iterable[torch.nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    """
    AdamW, or Adam for a script without weight decay, as published; in 8 bits where asked for.

    Raises:
        ImportError: if 8 bits are asked for and bitsandbytes is not installed.
    """
    has_decay = hasattr(args, "adam_weight_decay")
    options = {}
    if args.use_8bit_adam:
        try:
            import bitsandbytes as bnb
        except ImportError as error:
            raise ImportError(
                "--use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave it out"
            ) from error
        optimizer_class = bnb.optim.AdamW8bit if has_decay else bnb.optim.Adam8bit
    else:
        optimizer_class = torch.optim.AdamW if has_decay else torch.optim.Adam
        accelerator = torch.accelerator.current_accelerator()
        options["fused"] = accelerator is None or accelerator.type in FUSED
    if has_decay:
        options["weight_decay"] = args.adam_weight_decay
    betas = (args.adam_beta1, args.adam_beta2)
    return optimizer_class(parameters, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, **options)


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, max_train_steps: int, num_processes: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """
    The schedule over a whole run. A prepared one moves on by the number of processes at each step, so it is made that
    much longer.
    """
    warmup, total = args.lr_warmup_steps * num_processes, max_train_steps * num_processes
    if args.lr_scheduler == "polynomial":
        # diffusers' own `get_scheduler` ends at 1e-7; published is 0.
        return get_polynomial_decay_schedule_with_warmup(optimizer, warmup, total, lr_end=0.0, power=args.lr_power)
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        num_cycles=args.lr_num_cycles,
    )
