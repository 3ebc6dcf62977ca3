"""The published checkpoints, read into diffusers components."""

from .maisi_checkpoint import VERSIONS, load_maisi_checkpoint
from .repository import Repository

__all__ = ["VERSIONS", "Repository", "load_maisi_checkpoint"]
