"""What the pipelines return."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from diffusers.utils import BaseOutput


@dataclass
class MaisiCTPipelineOutput(BaseOutput):
    """
    Args:
        images: by `output_type`: `"nifti"` a list of `nibabel.Nifti1Image`, int16 HU; `"np"` float32 (N, X, Y, Z) in
            HU; `"pt"` float32 (N, 1, X, Y, Z) in HU; `"latent"` (N, 4, X/4, Y/4, Z/4). MR is in 0..1000 and above.
        labels: the paired label maps, same kinds: uint8 NIfTI, uint8 (N, X, Y, Z) or (N, 1, X, Y, Z); `None` with
            `image_only=True`.
    """

    images: list[nib.Nifti1Image] | np.ndarray | torch.Tensor
    labels: list[nib.Nifti1Image] | np.ndarray | torch.Tensor | None


@dataclass
class MaisiMaskPipelineOutput(BaseOutput):
    """
    Args:
        masks: by `output_type`: `"nifti"` a list of `nibabel.Nifti1Image`, uint8; `"np"` uint8 (N, X, Y, Z); `"pt"`
            uint8 (N, 1, X, Y, Z); `"latent"` (N, 4, X/4, Y/4, Z/4).
    """

    masks: list[nib.Nifti1Image] | np.ndarray | torch.Tensor
