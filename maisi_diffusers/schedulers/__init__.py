"""The schedulers. They know nothing of files or labels."""

from .scheduling_maisi_rflow import MaisiRFlowScheduler, MaisiRFlowSchedulerOutput

__all__ = ["MaisiRFlowScheduler", "MaisiRFlowSchedulerOutput"]
