"""Label maps from anatomy sizes."""

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict
from numbers import Real

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..anatomy import (
    CONTROLLABLE_ANATOMY,
    LABELS,
    MASK_VAE_LABELS,
    TUMORS,
    anatomy_sizes,
    clean_up,
    complete_anatomy_size,
    fit_tumor,
    remove_crumbs,
    volume_of_size,
)
from ..anatomy.size_conditions import ABSENT
from ..imaging import labels_to_nifti, spacing_affine
from ..models import AutoencoderKLMaisi, MaisiUNet3DConditionModel
from ..schedulers import MaisiRFlowScheduler
from ..schedulers.flow_solvers import set_timesteps
from .denoising import check_sampling, denoise, prediction_type_of, prepare_latents
from .pipeline_output import MaisiMaskPipelineOutput

RFLOW_STEPS = 30
STRAY = 0.1  # of the volume of a tumor: a smaller piece is none


def anatomy_size_vector(
    controllable_anatomy_size: list[tuple[str, float]] | None, anatomy_size: list[float] | None
) -> list[float]:
    """
    The mask UNet's condition, one size for each of [`CONTROLLABLE_ANATOMY`].

    Args:
        controllable_anatomy_size: pairs of name and size, 0..1 or -1 for absent; the anatomy not named is absent.
        anatomy_size: the whole vector of 10 instead.

    Raises:
        ValueError: unknown or repeated names, sizes out of range, more than one tumor, both or neither argument.
    """
    if (controllable_anatomy_size is None) == (anatomy_size is None):
        raise ValueError(
            "give exactly one of controllable_anatomy_size (pairs of name and size) and anatomy_size (the vector of "
            f"10), not {'both' if anatomy_size is not None else 'neither'}"
        )
    given = controllable_anatomy_size if anatomy_size is None else anatomy_size
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"{given!r} is not a list: give pairs like ('liver', 0.5), or the vector of 10 sizes")
    if not given:
        raise ValueError("there is no size in the list: give pairs like ('liver', 0.5), or the vector of 10 sizes")
    if anatomy_size is None:
        for pair in controllable_anatomy_size:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[1], Real):
                raise ValueError(f"{pair!r} is not a pair of name and size: give pairs like ('liver', 0.5)")
        names = [name for name, _ in controllable_anatomy_size]
        for name in names:
            if name not in CONTROLLABLE_ANATOMY:
                raise ValueError(f"{name!r} has no controllable size: use one of {', '.join(CONTROLLABLE_ANATOMY)}")
            if names.count(name) > 1:
                raise ValueError(
                    f"{name!r} is given {names.count(name)} times in controllable_anatomy_size: give it once"
                )
        sizes = dict(controllable_anatomy_size)
        anatomy_size = [sizes.get(name, ABSENT) for name in CONTROLLABLE_ANATOMY]

    if len(anatomy_size) != len(CONTROLLABLE_ANATOMY):
        raise ValueError(
            f"anatomy_size has {len(anatomy_size)} entries: give {len(CONTROLLABLE_ANATOMY)}, "
            f"for {', '.join(CONTROLLABLE_ANATOMY)}"
        )
    for name, size in zip(CONTROLLABLE_ANATOMY, anatomy_size):
        if not isinstance(size, Real) or (size != ABSENT and not 0 <= size <= 1):
            raise ValueError(f"the size {size!r} of {name!r} is not allowed: give 0 to 1, or -1 for absent")
    tumors = [name for name, size in zip(CONTROLLABLE_ANATOMY[5:], anatomy_size[5:]) if size != ABSENT]
    if len(tumors) > 1:
        raise ValueError(f"at most one tumor can be controlled, not {' and '.join(map(repr, tumors))}: choose one")
    return [float(size) for size in anatomy_size]


class MaisiMaskPipeline(DiffusionPipeline):
    r"""
    Make label maps with organs and a tumor of a given size ([Guo et al., 2024](https://arxiv.org/abs/2409.11169)).

    The components have the names they have in [`MaisiCTPipeline`], so that `MaisiMaskPipeline.from_pipe(ct_pipeline)`
    and `MaisiMaskPipeline.from_pretrained` on its repository give this pipeline.

    Args:
        mask_vae: the VAE of label maps, whose outputs are the 125 labels of [`MASK_VAE_LABELS`].
        mask_unet: the UNet of its latents.
        mask_scheduler: the scheduler it was trained with, or, for a rectified-flow model, a flow solver of diffusers
            made by `from_config(pipe.mask_scheduler.config)`.
        mask_latent_size: voxels of the latent along X, Y, Z.
        mask_spacing: spacing of the label maps in mm.
        mask_prediction_type: what the UNet predicts, `"flow_prediction"` or `"epsilon"`; what the scheduler takes if
            not given.
        mask_num_inference_steps: the number of steps where a call gives none; if not given, 30 for rectified flow and
            as many as the scheduler was trained with for DDPM.
        mask_size_ranges: name of a controllable anatomy -> its volumes in ml at size 0 and at size 1, between which
            the size grows with the cube root of the volume; `None` if not known.

    Example:

    ```py
    >>> from maisi_diffusers import MaisiMaskPipeline

    >>> pipe = MaisiMaskPipeline.from_pretrained("my/maisi-rflow-ct")
    >>> mask = pipe(controllable_anatomy_size=[("liver", 0.5), ("hepatic tumor", 0.3)]).masks[0]
    >>> mask.to_filename("mask.nii.gz")
    ```
    """

    model_cpu_offload_seq = "mask_unet->mask_vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        mask_vae: AutoencoderKLMaisi,
        mask_unet: MaisiUNet3DConditionModel,
        mask_scheduler: DDPMScheduler | MaisiRFlowScheduler,
        mask_latent_size: list[int] = [64, 64, 64],
        mask_spacing: list[float] = [1.5, 1.5, 1.5],
        mask_prediction_type: str | None = None,
        mask_num_inference_steps: int | None = None,
        mask_size_ranges: dict[str, list[float]] | None = None,
    ):
        super().__init__()
        self.register_modules(mask_vae=mask_vae, mask_unet=mask_unet, mask_scheduler=mask_scheduler)
        self.register_to_config(
            mask_latent_size=list(mask_latent_size),
            mask_spacing=list(mask_spacing),
            mask_prediction_type=mask_prediction_type or prediction_type_of(mask_scheduler),
            mask_num_inference_steps=mask_num_inference_steps,
            mask_size_ranges=mask_size_ranges,
        )
        self._interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the current run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to end the run: it sets `pipe._interrupt = True`."""
        return self._interrupt

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Latents to label maps.

        Args:
            latents (N, C, X, Y, Z): as the UNet made them.

        Returns:
            uint8 (N, 1, 4X, 4Y, 4Z) in MAISI's vocabulary.
        """
        table = torch.tensor(MASK_VAE_LABELS, dtype=torch.uint8, device=latents.device)
        latents = (latents / self.mask_vae.config.scaling_factor).to(self.mask_vae.dtype)
        return table[self.mask_vae.decode_classes(latents).long()]

    def finish(
        self,
        mask: np.ndarray,
        sizes: list[float],
        is_cleaned: bool,
        generator: torch.Generator | None = None,
        asked: Collection[str] = CONTROLLABLE_ANATOMY,
    ) -> tuple[np.ndarray, dict]:
        """
        Clean a label map up, bring its tumor to the size asked for where the model says how sizes are measured, and
        say what it has become.

        Args:
            mask: uint8 (X, Y, Z) as it was decoded.
            sizes: of [`CONTROLLABLE_ANATOMY`], as the network was told.
            is_cleaned: or leave it as it is.
            generator: draws the place of a tumor that the networks left out.
            asked: names of those that were asked for; the others are a real case's.

        Returns:
            the label map, and its report, see [`MaisiMaskPipelineOutput`].
        """
        told = {name: size for name, size in zip(CONTROLLABLE_ANATOMY, sizes) if size != ABSENT}
        spacing, ranges = self.config.mask_spacing, self.config.mask_size_ranges
        voxel = math.prod(spacing) / 1000
        done = crumbs = drawn = None
        tumor = next((name for name in told if LABELS[name] in TUMORS), None)
        if is_cleaned:
            mask, crumbs = remove_crumbs(mask)
            mask, done = clean_up(mask, LABELS.get(tumor))
            if tumor is not None and ranges is not None:
                drawn = np.count_nonzero(mask == LABELS[tumor]) * voxel
                ml = volume_of_size(told[tumor], ranges[tumor])
                mask = fit_tumor(mask, LABELS[tumor], ml, spacing, generator, stray=STRAY)
        reached = None
        if ranges is not None:
            reached = dict(zip(CONTROLLABLE_ANATOMY, anatomy_sizes(mask, spacing, ranges)))
        anatomy = {}
        for name, size in told.items():
            ml = np.count_nonzero(mask == LABELS[name]) * voxel
            anatomy[name] = {"asked" if name in asked else "completed": size, "ml": round(float(ml), 2)}
            if reached is not None:
                anatomy[name]["reached"] = reached[name]
        if drawn is not None:
            anatomy[tumor]["drawn_ml"] = round(float(drawn), 2)
        return mask, {"anatomy": anatomy, "clean_up": None if done is None else {"crumbs": crumbs, **asdict(done)}}

    @torch.no_grad()
    def __call__(
        self,
        controllable_anatomy_size: list[tuple[str, float]] | None = None,
        anatomy_size: list[float] | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        clean_up: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "nifti",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        anatomy_size_conditions: list[list[float]] | None = None,
    ) -> MaisiMaskPipelineOutput | tuple:
        r"""
        Args:
            controllable_anatomy_size: pairs of name and size, e.g. `[("liver", 0.5), ("hepatic tumor", 0.3)]`: 0..1,
                or -1 for absent; at most one tumor. The anatomy not named is absent, or as large as in the nearest of
                `anatomy_size_conditions`.
            anatomy_size: the whole vector of 10 sizes instead.
            num_images: label maps to make.
            num_inference_steps: the model's own number if not given.
            clean_up: put right what a generated label map gets wrong, see [`~maisi_diffusers.anatomy.remove_crumbs`]
                and [`~maisi_diffusers.anatomy.clean_up`], and bring the tumor to the size asked for, see
                [`~maisi_diffusers.anatomy.fit_tumor`], if the model has `mask_size_ranges`.
            generator: one, or one a label map, for the same result again.
            latents (N, C, X, Y, Z): the initial noise instead of drawing it.
            output_type: `"nifti"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: return a [`MaisiMaskPipelineOutput`] instead of a tuple.
            callback_on_step_end: called after every step as `callback(pipe, step, timestep, {"latents": ...})`.
            callback_on_step_end_tensor_inputs: `["latents"]` or `[]`.
            anatomy_size_conditions: the 10 sizes of real cases, by which the organs that `controllable_anatomy_size`
                does not name get theirs, see [`~maisi_diffusers.anatomy.complete_anatomy_size`].

        Raises:
            ValueError: for arguments that are out of range or contradict each other, before any network runs.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            is_flow = self.config.mask_prediction_type == "flow_prediction"
            own = RFLOW_STEPS if is_flow else self.mask_scheduler.config.num_train_timesteps
            num_inference_steps = self.config.mask_num_inference_steps or own
        self._interrupt = False

        # 1. Check inputs
        sizes, asked = anatomy_size_vector(controllable_anatomy_size, anatomy_size), CONTROLLABLE_ANATOMY
        if controllable_anatomy_size is not None and anatomy_size_conditions is not None:
            sizes = complete_anatomy_size(controllable_anatomy_size, anatomy_size_conditions)
            asked = [name for name, _ in controllable_anatomy_size]
        latent_shape = (num_images, self.mask_unet.config.in_channels, *self.config.mask_latent_size)
        check_sampling(
            self.mask_scheduler,
            self.config.mask_prediction_type,
            num_images,
            num_inference_steps,
            generator,
            latents,
            latent_shape,
            output_type,
            callback_on_step_end_tensor_inputs,
        )

        # 2. Prepare noise, timesteps and condition
        device = self._execution_device
        for network in (self.mask_unet, self.mask_vae):
            network.lay_out(device)
        latents = prepare_latents(latent_shape, device, generator, latents)
        timesteps = set_timesteps(self.mask_scheduler, num_inference_steps, device, latents[0, 0].numel())
        dtype = self.mask_unet.dtype
        condition = torch.tensor(sizes, dtype=dtype, device=device).expand(num_images, 1, -1)

        # 3. Denoise
        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.mask_unet(latents.to(dtype), timestep, encoder_hidden_states=condition, return_dict=False)[0]

        latents = denoise(
            self,
            self.mask_scheduler,
            predict,
            latents,
            timesteps,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 4. Decode and clean up
        reports = None
        if output_type == "latent":
            masks = latents
        else:
            masks = self.decode(latents)[:, 0].cpu().numpy()
            generators = generator if isinstance(generator, list) else [generator] * num_images
            masks, reports = zip(
                *(self.finish(mask, sizes, clean_up, one, asked) for mask, one in zip(masks, generators))
            )
            for i, report in enumerate(reports):
                missing = [name for name, one in report["anatomy"].items() if "asked" in one and not one["ml"]]
                if missing:
                    warnings.warn(
                        f"label map {i} has no {' and no '.join(missing)}, which was asked for: another seed may give "
                        "one, or another size",
                        stacklevel=3,
                    )
        self.maybe_free_model_hooks()
        if output_type == "nifti":
            masks = [labels_to_nifti(mask, spacing_affine(self.config.mask_spacing)) for mask in masks]
        elif output_type != "latent":
            masks = np.stack(masks)
            masks = masks if output_type == "np" else torch.from_numpy(masks)[:, None].to(device)

        reports = None if reports is None else list(reports)
        if not return_dict:
            return (masks, reports)
        return MaisiMaskPipelineOutput(masks=masks, reports=reports)
