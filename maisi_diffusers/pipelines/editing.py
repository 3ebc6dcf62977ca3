"""Changing a given CT: what of it is painted anew, and how that is put into it."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real

import nibabel as nib
import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from scipy import ndimage

from ..imaging import background_value, ct_to_nifti, from_hu, load_volume, resample_like, spacing_of
from ..models import AutoencoderKLMaisi
from ..schedulers.flow_solvers import integrates_flow

FEATHER = 6.0
"""mm around repainted labels in which the new image passes into the given one."""


@dataclass(frozen=True)
class Edit:
    """
    A given CT, as the pipeline needs it.

    Args:
        image: the CT (X, Y, Z) on its own grid, in HU.
        weights: how much of the new image goes into it, 0 to 1, (X, Y, Z) on that grid; `None` for all of it.
        latents (1, C, x, y, z): of the CT on the model's grid, scaled.
        latent_weights (1, 1, x, y, z): where these change, 0 or 1; `None` for everywhere.
    """

    image: nib.Nifti1Image
    weights: np.ndarray | None
    latents: torch.Tensor
    latent_weights: torch.Tensor | None

    def keep_the_rest(
        self, noised: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, timestep: torch.Tensor | None
    ) -> torch.Tensor:
        """Latents (N, C, x, y, z) at a timestep, `None` for the end, with those of the CT where nothing is to change;
        `noised` gives these at a timestep."""
        if self.latent_weights is None:
            return latents
        own = self.latents if timestep is None else noised(timestep)
        return torch.where(self.latent_weights > 0, latents, own)

    def compose(self, made: nib.Nifti1Image, reconstruction: np.ndarray | None) -> nib.Nifti1Image:
        """
        The CT with what was made in it.

        Args:
            made: image in HU on the model's grid.
            reconstruction (X, Y, Z): the CT itself, encoded and decoded, on that grid; where labels are repainted.

        Returns:
            the CT on its own grid, as it was beyond that of the model. Where labels are repainted, the difference of
            the two is added to it, so that what the VAE cannot show (noise, fine edges) stays; where their weight is
            0, it is the same to the voxel.
        """
        hu = np.asarray(self.image.dataobj)
        if self.weights is None:
            made_hu = np.asarray(resample_like(made, self.image, order=1, fill=0).dataobj)
            hu = made_hu + (1 - extent(made, self.image)) * hu
        else:
            change = np.asarray(made.dataobj, dtype=np.float32) - reconstruction
            change = resample_like(nib.Nifti1Image(change, made.affine), self.image, order=1, fill=0)
            hu = np.where(self.weights > 0, hu + np.asarray(change.dataobj) * self.weights, hu)
        return ct_to_nifti(hu, self.image.affine)


def prepare_edit(
    image: str | os.PathLike | nib.Nifti1Image,
    mask: nib.Nifti1Image,
    label_map: nib.Nifti1Image,
    repaint_labels: Mapping[int, str] | None,
    feather: float,
    vae: AutoencoderKLMaisi,
    modality: int,
    device: torch.device,
) -> Edit:
    """
    Read and encode a CT.

    Args:
        image: path or image, on the grid of `mask`.
        mask: its label map, as it is to be afterwards, in MAISI's vocabulary.
        label_map: the same on the model's grid, in RAS+.
        repaint_labels: labels to paint anew, and their names; all of the CT if not given.
        feather: mm around them.
        vae: encodes the CT.
        modality: its code decides on the intensity range.
        device: where the networks run.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: image and mask on different grids; no voxel of the labels in the mask; not all of them, or none, on
            the model's grid.
    """
    image = load_volume(image)
    if image.shape != mask.shape or not np.allclose(image.affine, mask.affine, atol=1e-3):
        raise ValueError(
            f"image has size {image.shape} and mask {mask.shape}, or their affines differ: give a label map that is "
            "drawn on the image"
        )
    weights = latent_weights = None
    if repaint_labels is not None:
        names = ", ".join(repaint_labels.values())
        weights = paint_weights(mask, repaint_labels, feather)
        if weights is None:
            raise ValueError(f"repaint_labels: the mask has no {names}; draw it in the mask first, or leave it out")
        on_grid = paint_weights(label_map, repaint_labels, feather)
        if on_grid is None:
            raise ValueError(
                f"repaint_labels: {names} has no voxel left on the model's grid of {spacing_of(label_map)} mm; give a "
                "finer spacing, or draw it larger"
            )
        if (extent(label_map, mask)[weights == 1] == 0).any():
            raise ValueError(
                f"repaint_labels: {names} lies in part beyond the field of view, {label_map.shape} voxels of "
                f"{spacing_of(label_map)} mm; give a larger output_size, or neither size nor spacing"
            )
        blocks = torch.from_numpy((on_grid > 0).astype(np.float32))[None, None].to(device)
        latent_weights = torch.nn.functional.max_pool3d(blocks, vae.spatial_compression_ratio)
    background = background_value(modality)
    hu = np.asarray(resample_like(image, label_map, order=1, fill=background).dataobj, dtype=np.float32)
    intensities = from_hu(torch.from_numpy(hu)[None, None], modality).to(device, vae.dtype)
    latents = vae.encode(intensities).latent_dist.mode().float() * vae.config.scaling_factor
    return Edit(image, weights, latents, latent_weights)


def extent(image: nib.Nifti1Image, reference: nib.Nifti1Image) -> np.ndarray:
    """1 in what an image shows of the grid of a reference, falling to 0 beyond, float32 (X, Y, Z)."""
    ones = nib.Nifti1Image(np.ones(image.shape, dtype=np.float32), image.affine)
    return np.asarray(resample_like(ones, reference, order=1, fill=0).dataobj)


def paint_weights(labels: nib.Nifti1Image, repaint_labels: Iterable[int], feather: float) -> np.ndarray | None:
    """1 in some labels of a label map, falling to 0 at `feather` mm from them, float32 (X, Y, Z); `None` where the
    label map has none of them."""
    array = np.asarray(labels.dataobj)
    inside = np.isin(array, list(repaint_labels))
    if not inside.any():
        return None
    spacing = nib.affines.voxel_sizes(labels.affine)
    reach = [int(np.ceil(feather / mm)) + 1 for mm in spacing]
    (box,) = ndimage.find_objects(inside.astype(np.uint8))
    box = tuple(slice(max(s.start - r, 0), s.stop + r) for s, r in zip(box, reach))
    weights = np.zeros(array.shape, dtype=np.float32)
    distance = ndimage.distance_transform_edt(~inside[box], sampling=spacing)
    weights[box] = np.clip(1 - distance / feather, 0, 1) if feather > 0 else inside[box]
    return weights


def first_step(strength: float, num_steps: int) -> int:
    """Steps that are left out at a strength of 0 to 1: all at 0 alone, none at 1."""
    return num_steps - (max(round(num_steps * strength), 1) if strength > 0 else 0)


def add_noise(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Latents (1 or N, C, x, y, z) as they are at a timestep of the model."""
    if integrates_flow(scheduler):
        share = float(timestep) / scheduler.config.num_train_timesteps
        return (1 - share) * latents + share * noise
    return scheduler.add_noise(latents.expand_as(noise), noise, timestep.long().reshape(1).expand(len(noise)))


def check_edit(
    image: object,
    mask: object,
    strength: float,
    repaint_labels: list | None,
    feather: float,
    output_type: str,
    scheduler: SchedulerMixin,
) -> None:
    """Refuse arguments that do not go together; raises a `ValueError`."""
    if image is None:
        given = {
            "strength": strength != 1,
            "repaint_labels": repaint_labels is not None,
            "feather": feather != FEATHER,
        }
        for name, is_given in given.items():
            if is_given:
                raise ValueError(f"{name} says how image is changed, and there is none: give both or neither")
        return
    if mask is None:
        raise ValueError("image is changed to fit a label map, and there is none: give mask=")
    if output_type != "nifti":
        raise ValueError(f"image is returned on its own grid, which output_type='nifti' has, not {output_type!r}")
    if not isinstance(feather, Real) or not 0 <= feather < math.inf:
        raise ValueError(f"feather={feather!r} is not allowed: give mm, 0 or more")
    if repaint_labels is None and feather != FEATHER:
        raise ValueError("feather is around repaint_labels, and there are none: give both or neither")
    if not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise ValueError(f"strength={strength!r} is not allowed: give 0 (nothing changes) to 1")
    if repaint_labels is not None and (not isinstance(repaint_labels, (list, tuple)) or not repaint_labels):
        raise ValueError(f"repaint_labels={repaint_labels!r} is not allowed: give a list of labels or names")
    if not integrates_flow(scheduler) and not isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            f"image cannot be changed with {type(scheduler).__name__}: use the model's own scheduler or a flow solver"
        )
