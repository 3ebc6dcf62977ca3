"""The published checkpoints, read into diffusers components."""

from .maisi_checkpoint import VERSIONS, load_maisi_checkpoint

__all__ = ["VERSIONS", "load_maisi_checkpoint"]
