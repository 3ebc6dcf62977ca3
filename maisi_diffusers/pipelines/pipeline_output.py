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
            HU; `"pt"` float32 (N, 1, X, Y, Z) in HU; `"latent"` (N, C, X/4, Y/4, Z/4). MR is in 0..1000 and above.
        labels: the paired label maps, same kinds: uint8 NIfTI, uint8 (N, X, Y, Z) or (N, 1, X, Y, Z); `None` with
            `image_only=True`.
        reports: of every image a dict. `"label_map"`: of one that was looked up `"file"`, `"dim"` and `"spacing"` of
            its entry in the database and `"tumors"`, the fields of [`~maisi_diffusers.anatomy.MovedTumor`]; of one
            that was generated its report in [`MaisiMaskPipelineOutput`]; otherwise `None`. `"quality"`: what
            [`MaisiCTPipeline.check_quality`] found, `None` if there is nothing to check. `"attempts"`: how many times
            it was made.
    """

    images: list[nib.Nifti1Image] | np.ndarray | torch.Tensor
    labels: list[nib.Nifti1Image] | np.ndarray | torch.Tensor | None
    reports: list[dict] | None = None


@dataclass
class MaisiMaskPipelineOutput(BaseOutput):
    """
    Args:
        masks: by `output_type`: `"nifti"` a list of `nibabel.Nifti1Image`, uint8; `"np"` uint8 (N, X, Y, Z); `"pt"`
            uint8 (N, 1, X, Y, Z); `"latent"` (N, C, X/4, Y/4, Z/4).
        reports: of every label map a dict: `"anatomy"`, name -> `"asked"`, the size asked for, or `"completed"`, a
            real case's for an organ that was not named, and `"ml"`, the volume reached, with `"reached"`, its size,
            and `"drawn_ml"`, what the clean-up had left of a tumor before it was brought to its size, where the model
            says how sizes are measured; `"clean_up"`, `"crumbs"`, the voxels of pieces that are no anatomy, and the
            fields of [`~maisi_diffusers.anatomy.CleanUpReport`], `None` without. `None` for latents.
    """

    masks: list[nib.Nifti1Image] | np.ndarray | torch.Tensor
    reports: list[dict] | None = None
