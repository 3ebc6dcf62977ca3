"""Intensities of the VAE, 0..1, and the units of the images they stand for.

As published: for CT, 0..1 is -1000..1000 HU and both ends are clipped. For MR, 0..1 is 0..1000 in arbitrary units and
only the lower end is clipped, so that bright vessels survive. Which one holds depends on the modality code.
"""

from typing import TypeVar

import numpy as np
import torch

from .modality import is_ct

Intensities = TypeVar("Intensities", np.ndarray, torch.Tensor)

CT_LOW, CT_HIGH = -1000, 1000
MR_HIGH = 1000


def to_hu(intensities: Intensities, code: int) -> Intensities:
    """VAE intensities to HU, or to MR units where `code` is an MR modality. Floating point, any shape."""
    if is_ct(code):
        return intensities.clip(0, 1) * (CT_HIGH - CT_LOW) + CT_LOW
    return intensities.clip(0, None) * MR_HIGH


def from_hu(image: Intensities, code: int) -> Intensities:
    """HU, or MR units where `code` is an MR modality, to VAE intensities: the inverse of [`to_hu`]."""
    if is_ct(code):
        return (image.clip(CT_LOW, CT_HIGH) - CT_LOW) / (CT_HIGH - CT_LOW)
    return image.clip(0, None) / MR_HIGH


def background_value(code: int) -> int:
    """What voxels outside the body are set to: air in HU, or 0 where `code` is an MR modality."""
    return CT_LOW if is_ct(code) else 0
