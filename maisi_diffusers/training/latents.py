"""Latents for training: how a volume or a label map becomes one, and how one is stored and read again.

The recipe is that of the published models (`diff_model_create_training_data.py` of NVIDIA's MAISI release): RAS+,
intensities in 0..1, resized trilinearly to a multiple of 128 along each axis, encoded once, stored unscaled as NIfTI
(X, Y, Z, C). There it is one draw from the VAE's posterior; here it can be the moments, to draw from at every step.
A label map is resized to the nearest label, and the mask VAE encodes its bits.
"""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ..anatomy import label_bits
from ..files import write_atomically
from ..imaging import from_hu, is_ct, resample_to_grid, spacing_of, to_ras
from ..imaging.nifti import SCANNER_ANATOMICAL, UNREADABLE
from ..models import AutoencoderKLMaisi

# Intensities of an MR volume that become 0 and 1, in percent of its voxels, as the published VAE was trained.
MR_PERCENTILES = (0.0, 99.5)
# What a posterior's log-variance is held to, in diffusers as well.
LOGVAR_LIMITS = (-30.0, 20.0)


def nearest_multiple(size: tuple[int, int, int], multiple: int) -> tuple[int, int, int]:
    """The multiple nearest to each axis of a size in voxels, 1 at least; half-way the even one, as published."""
    return tuple(max(round(n / multiple), 1) * multiple for n in size)


def to_intensities(image: nib.Nifti1Image, code: int) -> nib.Nifti1Image:
    """
    Intensities the VAE is trained on, float32: for CT [`from_hu`], for MR 0 at the minimum and 1 at the 99.5th
    percentile of the volume, with nothing clipped.

    Args:
        image: volume (X, Y, Z) in HU or in MR units.
        code: modality code.

    Raises:
        ValueError: for an MR volume that has no contrast between the two.
    """
    data = np.asarray(image.dataobj, dtype=np.float32)
    if is_ct(code):
        return nib.Nifti1Image(from_hu(data, code), image.affine)
    low, high = (float(value) for value in np.percentile(data, MR_PERCENTILES))
    if low == high:
        raise ValueError(
            f"The MR volume is {low:g} up to its {MR_PERCENTILES[1]:g}th percentile, must have contrast; check it."
        )
    return nib.Nifti1Image((data - low) / (high - low), image.affine)


def resize_volume(image: nib.Nifti1Image, size: tuple[int, int, int], order: int = 1) -> nib.Nifti1Image:
    """
    Resample to a size in voxels; the field of view stays, the voxel size changes.

    Args:
        image: volume or label map (X, Y, Z).
        size: voxels along X, Y, Z.
        order: 1 interpolates trilinearly, 0 takes the nearest voxel, for labels.
    """
    spacing = tuple(mm * n / new for mm, n, new in zip(spacing_of(image), image.shape, size))
    return resample_to_grid(image, size, spacing, order=order, fill=0.0)


def encodes_labels(vae: AutoencoderKLMaisi) -> bool:
    """Whether it is a mask VAE, which takes label maps in 8 bits."""
    return vae.config.in_channels == 8


@torch.inference_mode()
def encode_volume(vae: AutoencoderKLMaisi, image: nib.Nifti1Image) -> torch.Tensor:
    """
    The posterior of a volume's latent, or for a mask VAE of a label map's.

    Args:
        vae: on the device and in the dtype it is to run in.
        image: intensities (X, Y, Z) in 0..1, or uint8 labels, in RAS+, every axis divisible by the VAE's downsampling
            (4).

    Returns:
        moments (2C, X/4, Y/4, Z/4) float32 on the CPU: C means, then C log-variances of the unscaled latent.

    Raises:
        ValueError: if they are not finite, which half precision can lead to.
    """
    sample = torch.from_numpy(np.ascontiguousarray(image.dataobj))[None, None].to(vae.device)
    sample = label_bits(sample, vae.dtype) if encodes_labels(vae) else sample.to(vae.dtype)
    posterior = vae.encode(sample).latent_dist
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].float().cpu()
    if not moments.isfinite().all():
        raise ValueError(f"The VAE gives NaN or infinite values in {vae.dtype}; encode in float32.")
    return moments


def draw_latent(moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Draw from the posterior, as `latent_dist.sample(generator)` does.

    Args:
        moments (2C, X, Y, Z): C means, then C log-variances.
        generator: of the CPU; the mean is taken without one.

    Returns:
        latent (C, X, Y, Z).
    """
    mean, logvar = moments.chunk(2)
    if generator is None:
        return mean
    std = torch.exp(0.5 * logvar.clamp(*LOGVAR_LIMITS))
    return mean + std * torch.randn(mean.shape, generator=generator)


def save_latent(
    path: str | os.PathLike, latent: torch.Tensor, volume: nib.Nifti1Image, description: str = "MAISI latent"
) -> None:
    """
    Write a latent in the published layout, NIfTI (X, Y, Z, C) float32, with the field of view of its volume.

    Args:
        path: of the .nii.gz or .nii file; it is there as a whole or not at all.
        latent (C, X, Y, Z): latent or moments, on the CPU.
        volume: what was encoded.
        description: for the header, 79 bytes at most.
    """
    ratio = np.divide(volume.shape, latent.shape[1:])
    # Centres of the latent's voxels lie in the middle of the volume's voxels that they stand for.
    affine = volume.affine @ nib.affines.from_matvec(np.diag(ratio), (ratio - 1) / 2)
    image = nib.Nifti1Image(latent.float().movedim(0, -1).numpy(), affine)
    image.set_sform(affine, code=SCANNER_ANATOMICAL)
    image.set_qform(affine, code=SCANNER_ANATOMICAL)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    with write_atomically(path) as temporary:
        image.to_filename(temporary)


def load_latent(
    path: str | os.PathLike, latent_channels: int = 4, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Read a latent, or draw one where the file has the moments of the posterior.

    Args:
        path: NIfTI (X, Y, Z, C), or (X, Y, Z, 2C) with C means, then C log-variances; unscaled.
        latent_channels: C.
        generator: of the CPU, for the draw; the mean is taken without one.

    Returns:
        latent (C, X, Y, Z) float32 in RAS+.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, has another shape, or values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No latent {str(path)!r}; encode the data list with scripts/encode_latents.py.")
    try:
        data = np.asarray(to_ras(nib.load(path)).dataobj, dtype=np.float32)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is no latent or is cut short ({reason}); encode it again.") from error
    if data.ndim != 4 or data.shape[3] not in (latent_channels, 2 * latent_channels):
        raise ValueError(
            f"{str(path)!r} has shape {data.shape}, must be a latent (X, Y, Z, {latent_channels}) or its moments "
            f"(X, Y, Z, {2 * latent_channels}); encode it with scripts/encode_latents.py."
        )
    latent = torch.from_numpy(np.ascontiguousarray(np.moveaxis(data, 3, 0)))
    if not latent.isfinite().all():
        raise ValueError(f"{str(path)!r} has NaN or infinite values; encode it again.")
    return latent if len(latent) == latent_channels else draw_latent(latent, generator)
