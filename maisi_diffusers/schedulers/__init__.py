"""The schedulers. They know nothing of files or labels."""

import diffusers

from .scheduling_maisi_rflow import MaisiRFlowScheduler, MaisiRFlowSchedulerOutput

__all__ = ["MaisiRFlowScheduler", "MaisiRFlowSchedulerOutput"]

# `from_config` of another solver looks for the class that a config is of in diffusers, to tell what it may ignore.
diffusers.MaisiRFlowScheduler = MaisiRFlowScheduler
