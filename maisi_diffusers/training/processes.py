"""On how many processes and on which device a script runs."""

import os
import warnings
from datetime import timedelta

import torch

TIMEOUT = timedelta(days=7)
"""Of processes that share cases: one may be done long before another; the default, at most half an hour, would end
both."""


def runs_on_cpu() -> bool:
    """
    Whether to tell accelerate to use the CPU: where that is asked for (`accelerate launch --cpu`), or nothing else is
    there. Untold, each of several processes on a machine without accelerator takes itself for the only one.

    Warns:
        when `accelerate launch --cpu --num_processes 2` was meant to start more than the one process it starts.
    """
    started_by_launcher_or_mpi = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(os.environ)
    if "MASTER_ADDR" in os.environ and not started_by_launcher_or_mpi:
        warnings.warn(
            "accelerate launch --cpu starts one process without mpirun, whatever --num_processes says: for several "
            "use accelerate launch --multi_gpu --num_processes N, which runs on the CPU where there is no GPU, or "
            "torchrun",
            stacklevel=2,
        )
    asked_for = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked_for or not torch.accelerator.is_available()
