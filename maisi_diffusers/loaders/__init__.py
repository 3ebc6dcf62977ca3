"""The published checkpoints, read into diffusers components."""

from .maisi_checkpoint import VERSIONS, find_checkpoint, load_maisi_checkpoint
from .repository import Repository

__all__ = ["VERSIONS", "Repository", "find_checkpoint", "load_maisi_checkpoint"]
