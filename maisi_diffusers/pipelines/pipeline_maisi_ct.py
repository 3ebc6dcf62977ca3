"""CT and MR volumes from label maps, from anatomy sizes, or from nothing but a region."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from numbers import Integral, Real
from typing import Self

import nibabel as nib
import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import distributed as dist

from ..anatomy import (
    LABELS,
    TUMORS,
    add_body_label,
    augment,
    check_quality,
    describe_outliers,
    label_bits,
    label_index,
    label_name,
    labels_present,
    load_label_map,
    new_vocabulary,
    one_hot,
    region_of_word,
    regions_from_labels,
    regions_from_words,
    remove_tumors,
)
from ..imaging import (
    background_value,
    ct_to_nifti,
    is_ct,
    labels_to_nifti,
    load_volume,
    modality_code,
    resample_like,
    resample_to_grid,
    spacing_affine,
    spacing_of,
    to_hu,
    to_ras,
)
from ..loaders import VERSIONS, find_checkpoint, load_maisi_checkpoint
from ..models import AutoencoderKLMaisi, MaisiControlNetModel, MaisiUNet3DConditionModel
from ..schedulers import MaisiRFlowScheduler
from ..schedulers.flow_solvers import set_timesteps
from .anatomy_files import AnatomyFiles, AnatomyFilesMixin
from .denoising import check_sampling, denoise, prediction_type_of, prepare_latents
from .editing import FEATHER, Edit, add_noise, check_edit, first_step, prepare_edit
from .input_rules import CT_RULES, MR_RULES, check_grid, check_size_and_spacing, fit_grid, nearest_grid
from .parallel import latents_of_first, of_first, spread
from .pipeline_maisi_mask import RFLOW_STEPS, MaisiMaskPipeline, anatomy_size_vector
from .pipeline_output import MaisiCTPipelineOutput
from .recommended_grids import (
    MR_FOVS,
    MR_VOXEL,
    describe_unusual_fov,
    describe_unusual_mr_fov,
    recommended_grid,
    recommended_mr_fovs,
)

DEFAULT_SIZE = (512, 512, 512)
DEFAULT_SPACING = (1.0, 1.0, 1.0)
# Spacing and regions reach the UNet a hundredfold, as published.
CONDITION_SCALE = 100.0


class MaisiCTPipeline(AnatomyFilesMixin, DiffusionPipeline):
    r"""
    Make CT (or MR) volumes with paired label maps
    ([Guo et al., 2024](https://arxiv.org/abs/2409.11169), [Zhao et al., 2025](https://arxiv.org/abs/2508.05772)).

    Args:
        vae: the image VAE.
        unet: the image UNet.
        scheduler: the scheduler it was trained with, or, for a rectified-flow model, a flow solver of diffusers made
            by `from_config(pipe.scheduler.config)`.
        controlnet: steers the UNet by a label map.
        mask_vae: the VAE of generated label maps.
        mask_unet: the UNet of generated label maps.
        mask_scheduler: its scheduler.
        num_inference_steps: the number of steps the model was released with.
        image_only_num_inference_steps: the same for images without a label map; as many if not given.
        modality: the modality that is made where a call names none.
        modalities: names of all that the model was trained for; `None` if whoever calls it is to know.
        prediction_type: what the UNet predicts, `"flow_prediction"` or `"epsilon"`; what the scheduler takes if not
            given.
        input_rules: sizes and spacings the model was trained for (see
            [`maisi_diffusers.pipelines.input_rules`]); `None` for the hard limit alone, divisibility.
        mask_latent_size: voxels of a generated label map's latent.
        mask_spacing: spacing of a generated label map in mm.
        mask_prediction_type, mask_num_inference_steps, mask_size_ranges: of the mask UNet, see [`MaisiMaskPipeline`].
        default_output_size: voxels along X, Y, Z where a call gives none; `None` for 512 x 512 x 512.
        default_spacing: mm along X, Y, Z where a call gives none; `None` for 1 mm.
        quality_thresholds: organ -> lowest and highest median in HU of [`check_quality`]; `None` for those of the
            published training data.
        guidance_scale: guidance where a call gives none.
        recommended_fovs: modality -> region -> fields of view in mm that an MR model is meant for, one of which is
            made where a call gives no size or spacing (see [`maisi_diffusers.pipelines.recommended_grids`]).

    `pipe.mask_database` and `pipe.anatomy_size_conditions` come from the folder `mask_database` of the repository that
    the pipeline is loaded from (see docs/mask_database.md), when they are first used. Both can be set.

    Example:

    ```py
    >>> import torch
    >>> from maisi_diffusers import MaisiCTPipeline

    >>> pipe = MaisiCTPipeline.from_maisi_checkpoint("nvidia/NV-Generate-CT", version="rflow-ct")
    >>> out = pipe(mask="segmentation.nii.gz", generator=torch.Generator().manual_seed(0))
    >>> out.images[0].to_filename("ct.nii.gz")
    >>> out.labels[0].to_filename("labels.nii.gz")
    ```
    """

    # The ControlNet is called in turn with the UNet and so stays out of the chain.
    model_cpu_offload_seq = "mask_unet->mask_vae->unet->vae"
    _optional_components = ["controlnet", "mask_vae", "mask_unet", "mask_scheduler"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKLMaisi,
        unet: MaisiUNet3DConditionModel,
        scheduler: MaisiRFlowScheduler | DDPMScheduler,
        controlnet: MaisiControlNetModel | None = None,
        mask_vae: AutoencoderKLMaisi | None = None,
        mask_unet: MaisiUNet3DConditionModel | None = None,
        mask_scheduler: DDPMScheduler | MaisiRFlowScheduler | None = None,
        num_inference_steps: int = 30,
        image_only_num_inference_steps: int | None = None,
        modality: str = "ct",
        modalities: list[str] | None = None,
        prediction_type: str | None = None,
        input_rules: dict | None = None,
        mask_latent_size: list[int] = [64, 64, 64],
        mask_spacing: list[float] = [1.5, 1.5, 1.5],
        default_output_size: list[int] | None = None,
        default_spacing: list[float] | None = None,
        quality_thresholds: dict | None = None,
        guidance_scale: float = 0.0,
        recommended_fovs: dict | None = None,
        mask_prediction_type: str | None = None,
        mask_num_inference_steps: int | None = None,
        mask_size_ranges: dict[str, list[float]] | None = None,
    ):
        super().__init__()
        if mask_scheduler is not None:
            mask_prediction_type = mask_prediction_type or prediction_type_of(mask_scheduler)
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            controlnet=controlnet,
            mask_vae=mask_vae,
            mask_unet=mask_unet,
            mask_scheduler=mask_scheduler,
        )
        self.register_to_config(
            num_inference_steps=num_inference_steps,
            image_only_num_inference_steps=image_only_num_inference_steps,
            modality=modality,
            modalities=modalities,
            prediction_type=prediction_type or prediction_type_of(scheduler),
            input_rules=input_rules,
            mask_latent_size=list(mask_latent_size),
            mask_spacing=list(mask_spacing),
            mask_prediction_type=mask_prediction_type,
            mask_num_inference_steps=mask_num_inference_steps,
            mask_size_ranges=mask_size_ranges,
            default_output_size=None if default_output_size is None else list(default_output_size),
            default_spacing=None if default_spacing is None else list(default_spacing),
            quality_thresholds=quality_thresholds,
            guidance_scale=guidance_scale,
            recommended_fovs=recommended_fovs,
        )
        self._interrupt = False
        self.group: dist.ProcessGroup | None = None

    @classmethod
    def from_maisi_checkpoint(
        cls,
        source: str | os.PathLike,
        version: str,
        torch_dtype: torch.dtype = torch.float32,
        strict: bool = True,
        **hub_kwargs,
    ) -> Self:
        r"""
        The pipeline of a published checkpoint.

        Args:
            source: a folder in the published layout (`models/*.pt`, optionally `configs/config_network_*.json` and
                `datasets`), or a Hub repository id such as `"nvidia/NV-Generate-CT"`, from which `datasets` is
                downloaded when it is first needed, at the commit that the networks are of.
            version: `"rflow-ct"`, `"ddpm-ct"`, `"rflow-mr"` or `"rflow-mr-brain"`.
            torch_dtype: dtype of the networks.
            strict: an unexpected key in a file is an error; otherwise it is dropped with a warning.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            FileNotFoundError: a source or a required file that is not there.
            ValueError: an unknown version; a damaged or unsafe file; a key missing, unexpected or of another shape.
        """
        repository = find_checkpoint(source, version, **hub_kwargs)
        hub_kwargs["revision"] = repository.revision
        components = load_maisi_checkpoint(source, version, torch_dtype, strict, **hub_kwargs)
        is_ct = version.endswith("-ct")
        pipe = cls(
            **components,
            num_inference_steps=RFLOW_STEPS if VERSIONS[version].kind == "rflow" else 1000,
            modality="ct" if is_ct else "mri",
            input_rules=CT_RULES if is_ct else MR_RULES,
            guidance_scale=VERSIONS[version].guidance_scale,
            recommended_fovs=MR_FOVS.get(version),
        )
        if VERSIONS[version].anatomy is not None:
            pipe._anatomy_files = AnatomyFiles(repository, **VERSIONS[version].anatomy)
        return pipe

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the current run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to end the run: it sets `pipe._interrupt = True`."""
        return self._interrupt

    def enable_parallelism(self, group: dist.ProcessGroup | None = None, memory: int | str = "4GiB") -> None:
        r"""
        Spread one image over processes, each with this pipeline on a device of its own: they are called with the same
        arguments, a seeded `generator` among them, and all get the images. Under guidance the two predictions of a
        step are made at the same time, and the VAE's slabs are shared (see `enable_exact_tiling`). To make many
        images, let each process make its own instead.

        Args:
            group: the processes; all that were started if not given. `accelerate.PartialState()` starts them.
            memory: what the features of the VAE may take at once in each process.

        Raises:
            ValueError: if no processes were started.
        """
        if not dist.is_initialized():
            raise ValueError(
                "there are no processes to spread the work over: run this with accelerate launch or torchrun, and "
                "make accelerate.PartialState() before"
            )
        self.group = dist.group.WORLD if group is None else group
        self.vae.enable_exact_tiling(memory, group=self.group)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Name -> label of all the model knows: MAISI's, and the new classes that its ControlNet was trained for."""
        return new_vocabulary(self._controlnet_config("label_names"))

    @property
    def tumors(self) -> dict[int, tuple[int, ...]]:
        """Tumor -> the labels it can sit in: MAISI's, and the new ones that its ControlNet was trained for."""
        vocabulary = self.vocabulary
        new = self._controlnet_config("tumor_organs").items()
        return TUMORS | {vocabulary[name]: tuple(vocabulary[organ] for organ in organs) for name, organs in new}

    def _controlnet_config(self, name: str) -> dict:
        return {} if self.controlnet is None else self.controlnet.config[name] or {}

    def load_lora_weights(self, source: str | os.PathLike, adapter_name: str = "default", **hub_kwargs) -> None:
        """
        Add an adapter that `scripts/train_controlnet.py --use_lora` made to the ControlNet, with its new classes.

        Args:
            source: its folder or Hub id.
            adapter_name: what to call it, for `pipe.controlnet.set_adapters` and the like.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ValueError: if this model has no ControlNet.
        """
        if self.controlnet is None:
            raise ValueError("this model has no ControlNet that an adapter could be added to: load one with it")
        config = MaisiControlNetModel.load_config(source, **hub_kwargs)
        self.controlnet.load_lora_adapter(
            str(source), prefix=None, adapter_name=adapter_name, use_safetensors=True, **hub_kwargs
        )
        self.controlnet.add_classes(config["label_names"], config["tumor_organs"])

    @property
    def size_multiple(self) -> int:
        """What VAE and UNet downsample by together: every axis must be a multiple of it."""
        return self.vae.spatial_compression_ratio * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def check_inputs(
        self,
        body_region: list[str] | None,
        anatomy_list: list[str] | None,
        controllable_anatomy_size: list[tuple[str, float]] | None,
        anatomy_size: list[float] | None,
        mask: str | os.PathLike | nib.Nifti1Image | None,
        mask_vocabulary: str,
        body_image: str | os.PathLike | nib.Nifti1Image | None,
        image_only: bool,
        output_size: tuple[int, int, int] | None,
        spacing: tuple[float, float, float] | None,
        modality: int,
        guidance_scale: float,
        controlnet_conditioning_scale: float,
        output_type: str,
        restore_grid: bool,
    ) -> None:
        """Refuse arguments that are unknown, out of range or contradict each other; raises a `ValueError`."""
        check_size_and_spacing(output_size, spacing)
        for name, words in (("body_region", body_region), ("anatomy_list", anatomy_list)):
            if words is not None and not isinstance(words, (list, tuple)):
                raise ValueError(f"{name}={words!r} is not allowed: give a list of names")
        if body_region:
            regions_from_words(body_region)
        for anatomy in anatomy_list or []:
            label_index(anatomy, self.vocabulary)
        if controllable_anatomy_size is not None or anatomy_size is not None:
            anatomy_size_vector(controllable_anatomy_size, anatomy_size)
        nothing = np.zeros((1, 1, 1), dtype=np.uint8)  # a model's own thresholds may be wrong
        check_quality(nothing, nothing, self.config.quality_thresholds, self.vocabulary)

        sources = {
            "mask": mask,
            "controllable_anatomy_size": controllable_anatomy_size,
            "anatomy_size": anatomy_size,
            "anatomy_list": anatomy_list or None,
        }
        given = [name for name, value in sources.items() if value is not None]
        if image_only and given:
            raise ValueError(
                f"image_only=True makes an image without labels and contradicts {given[0]}: leave one out"
            )
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say what the label map is: leave one out")
        if not image_only and self.controlnet is None:
            raise ValueError(
                "this model has no ControlNet and cannot follow a label map: call it with image_only=True"
            )
        if not image_only and not {"mask", "controllable_anatomy_size", "anatomy_size"} & set(given):
            if not body_region and not anatomy_list:
                raise ValueError(
                    "this call has no label map: give body_region= or anatomy_list= to look one up in the mask "
                    "database, mask=, controllable_anatomy_size= or image_only=True"
                )
            if self.mask_database is None:
                raise ValueError(
                    "this call has no label map and this model no mask database to look one up in: give mask=, "
                    "controllable_anatomy_size= or image_only=True, or set pipe.mask_database"
                )
        if (controllable_anatomy_size is not None or anatomy_size is not None) and None in (
            self.mask_vae,
            self.mask_unet,
            self.mask_scheduler,
        ):
            raise ValueError("this model has no mask networks and cannot make a label map: give mask= instead")
        if mask_vocabulary != "maisi" and mask is None:
            raise ValueError(f"mask_vocabulary={mask_vocabulary!r} is whose labels mask= has, and none was given")
        if body_image is not None and mask is None:
            raise ValueError(
                "body_image is the CT that mask= was drawn on, and no mask was given: give both or neither"
            )
        if restore_grid and (mask is None or output_type != "nifti"):
            raise ValueError(
                "restore_grid=True puts the output on the grid of mask= and needs one, and output_type='nifti', "
                f"not {output_type!r}"
            )
        if image_only and self.unet.config.use_region_index and not body_region:
            raise ValueError(
                "this model takes the body region, which without a label map only body_region can tell: "
                "give e.g. body_region=['chest']"
            )
        num_class_embeds = self.unet.config.num_class_embeds
        if num_class_embeds is None and is_ct(modality) != is_ct(modality_code(self.config.modality)):
            raise ValueError(
                f"this model was trained for {self.config.modality!r} alone and cannot make modality code {modality}: "
                "leave modality out"
            )
        if num_class_embeds is not None and modality >= num_class_embeds:
            raise ValueError(f"this model has no modality code {modality}: it has 0 to {num_class_embeds - 1}")
        trained_for = self.config.modalities
        if trained_for is not None and modality not in map(modality_code, trained_for):
            raise ValueError(
                f"this model was not trained for modality code {modality}: use one of {', '.join(trained_for)}"
            )
        if not isinstance(guidance_scale, Real) or not 0 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale={guidance_scale} is not allowed: give 0 (off) or more")
        if not isinstance(controlnet_conditioning_scale, Real) or not math.isfinite(controlnet_conditioning_scale):
            raise ValueError(
                f"controlnet_conditioning_scale={controlnet_conditioning_scale} is not allowed: give a number"
            )
        if image_only and controlnet_conditioning_scale != 1:
            raise ValueError(
                "controlnet_conditioning_scale is how much a label map steers the image, and image_only=True has "
                "none: leave one out"
            )

    def own_num_inference_steps(self, image_only: bool) -> int:
        """The number of steps where a call gives none, with a label map or without."""
        without = self.config.image_only_num_inference_steps if image_only else None
        return without or self.config.num_inference_steps

    def choose_grid(
        self,
        body_region: list[str] | None,
        modality: int,
        output_size: tuple[int, int, int] | None,
        spacing: tuple[float, float, float] | None,
    ) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
        """
        Size and spacing of what is made without the user's label map. What was not given is that of the published
        model's training data for the region (CT), or what the model is meant for in region and modality (MR), else the
        model's own; one of both keeps the field of view of these.
        """
        grid = (self.config.default_output_size or DEFAULT_SIZE, self.config.default_spacing or DEFAULT_SPACING)
        if body_region and self.config.input_rules == CT_RULES:
            grid = recommended_grid(map(region_of_word, body_region)) or grid
        if fovs := self.suitable_fovs(body_region, modality):
            grid = nearest_grid(fovs[0], (MR_VOXEL,) * 3, self.size_multiple, self.config.input_rules)
        elif self.config.recommended_fovs and None in (output_size, spacing):
            of = f" of {' and '.join(body_region)}" if body_region else ""
            known = ", ".join(sorted(self.config.recommended_fovs))
            raise ValueError(
                f"this model has no recommended field of view for modality {modality}{of}: give output_size= and "
                f"spacing=, or another modality or region (it has some for {known})"
            )
        if output_size is None and spacing is None:
            output_size, spacing = grid
        elif output_size is None or spacing is None:
            output_size, spacing = fit_grid(*grid, output_size, spacing, self.size_multiple, self.config.input_rules)
        return tuple(output_size), tuple(spacing)

    def suitable_fovs(self, body_region: list[str] | None, modality: int) -> list[list[float]]:
        """Fields of view in mm that an MR model is meant for, in these regions and this modality."""
        regions = [region_of_word(word) for word in body_region] if body_region else None
        return recommended_mr_fovs(self.config.recommended_fovs or {}, modality, regions)

    def warn_of_unusual_fov(
        self,
        label_maps: list[nib.Nifti1Image] | None,
        body_region: list[str] | None,
        modality: int,
        output_size: tuple[int, int, int],
        spacing: tuple[float, float, float],
    ) -> None:
        """Warn where the published model has seen no such field of view of these regions."""
        if message := describe_unusual_mr_fov(self.suitable_fovs(body_region, modality), output_size, spacing):
            warnings.warn(message, stacklevel=4)
        if self.config.input_rules != CT_RULES:
            return
        if body_region:
            regions = {region_of_word(word) for word in body_region}
        elif label_maps is not None:
            try:
                top, bottom = regions_from_labels(labels_present(np.asarray(label_maps[0].dataobj)))
            except ValueError:  # no label tells
                return
            regions = set(range(top, bottom + 1))
        else:
            return
        if message := describe_unusual_fov(regions, output_size, spacing):
            warnings.warn(message, stacklevel=4)

    def load_mask(
        self,
        mask: str | os.PathLike | nib.Nifti1Image,
        mask_vocabulary: str,
        body_image: str | os.PathLike | nib.Nifti1Image | None,
    ) -> nib.Nifti1Image:
        """
        The user's label map in MAISI's labels and with the body, on its own grid.

        Args:
            mask: path or image, any orientation and affine.
            mask_vocabulary: `"maisi"` or `"totalsegmentator"`.
            body_image: the CT it was drawn on, for the outline of the body.

        Returns:
            uint8 labels.
        """
        labels = load_label_map(mask, mask_vocabulary)
        return add_body_label(labels, None if body_image is None else load_volume(body_image))

    def prepare_mask(
        self,
        mask: nib.Nifti1Image,
        output_size: tuple[int, int, int] | None,
        spacing: tuple[float, float, float] | None,
    ) -> nib.Nifti1Image:
        """
        The user's label map as the model needs it: in RAS+, on the wanted grid.

        Args:
            mask: uint8 labels in MAISI's vocabulary, with the body, in any orientation and affine.
            output_size: voxels along X, Y, Z; the nearest allowed one if not given.
            spacing: mm along X, Y, Z; what keeps the field of view if not given.

        Returns:
            uint8 labels; the affine keeps the centre and the axes of the user's.
        """
        labels = to_ras(mask)
        output_size, spacing = fit_grid(
            labels.shape, spacing_of(labels), output_size, spacing, self.size_multiple, self.config.input_rules
        )
        check_grid(output_size, spacing, self.size_multiple, self.config.input_rules)

        on_grid = resample_to_grid(labels, output_size, spacing, order=0, fill=0)
        lost = set(labels_present(np.asarray(labels.dataobj))) - set(labels_present(np.asarray(on_grid.dataobj)))
        if lost:
            names = ", ".join(label_name(index, self.vocabulary) for index in sorted(lost))
            warnings.warn(
                f"{names}: not in the label map any more on the grid {output_size} of {spacing} mm; "
                "use a larger output_size or a finer spacing to keep them",
                stacklevel=4,
            )
        return on_grid

    def look_up_masks(
        self,
        body_region: list[str] | None,
        anatomy_list: list[str] | None,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_size: tuple[int, int, int],
        spacing: tuple[float, float, float],
        augment_mask: bool = True,
    ) -> tuple[list[nib.Nifti1Image], list[tuple[int, int]] | None, list[dict]]:
        """
        Label maps from the mask database, those with the wanted grid or else the nearest, and variants of them, one an
        image; see [`MaisiMaskDatabase.find`] and [`~maisi_diffusers.anatomy.augment`].

        Returns:
            the label maps, uint8 in RAS+; the region (0..3) of the first and of the last slice of each, `None` where
            the database does not know them all; and what there is to say of each, see [`MaisiCTPipelineOutput`].

        Raises:
            FileNotFoundError: a label map that is not there.
            ValueError: none that fits; a damaged one.
        """
        found = self.mask_database.find(
            num_images,
            generator,
            body_region=body_region,
            anatomy_list=anatomy_list,
            output_size=output_size,
            spacing=spacing,
            vocabulary=self.vocabulary,
            tumors=self.tumors,
        )
        affine = spacing_affine(spacing)
        wanted = {label_index(anatomy, self.vocabulary) for anatomy in anatomy_list or ()}
        generators = generator if isinstance(generator, list) else [generator] * num_images
        label_maps, reports = [], []
        for one, mask in zip(generators, found):
            labels, tumors = np.asarray(add_body_label(mask.image).dataobj), []
            if augment_mask:
                variant, moved = augment(labels, spacing, one, self.tumors)
                if wanted <= set(labels_present(variant)):  # a label of some voxels can fall between those of a zoom
                    labels, tumors = variant, moved
                for tumor in tumors:
                    if not tumor.is_moved:
                        warnings.warn(
                            f"{label_name(tumor.tumor, self.vocabulary)} stays where it is in "
                            f"{mask.entry.pseudo_label_filename!r}: in {tumor.tries} tries there was no other place "
                            "for it in its organ",
                            stacklevel=4,
                        )
            label_maps.append(labels_to_nifti(labels, affine))
            entry = mask.entry
            report = {"file": entry.pseudo_label_filename, "dim": list(entry.dim), "spacing": list(entry.spacing)}
            reports.append({**report, "tumors": [asdict(tumor) for tumor in tumors]})
        regions = [mask.regions for mask in found]
        return label_maps, None if None in regions else regions, reports

    def generate_masks(
        self,
        controllable_anatomy_size: list[tuple[str, float]] | None,
        anatomy_size: list[float] | None,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_size: tuple[int, int, int],
        spacing: tuple[float, float, float],
    ) -> tuple[list[nib.Nifti1Image], list[dict]]:
        """Label maps made by [`MaisiMaskPipeline`], one an image, on the wanted grid, and its reports; the sizes that
        are not given are those of a real case, where the model has some. What was asked for and made, and is not on
        the grid, is warned of."""
        mask_pipeline = MaisiMaskPipeline(
            self.mask_vae,
            self.mask_unet,
            self.mask_scheduler,
            mask_latent_size=self.config.mask_latent_size,
            mask_spacing=self.config.mask_spacing,
            mask_prediction_type=self.config.mask_prediction_type,
            mask_num_inference_steps=self.config.mask_num_inference_steps,
            mask_size_ranges=self.config.mask_size_ranges,
        )
        mask_pipeline.set_progress_bar_config(**{"desc": "Label map", **getattr(self, "_progress_bar_config", {})})
        made = mask_pipeline(
            controllable_anatomy_size,
            anatomy_size,
            num_images,
            generator=generator,
            anatomy_size_conditions=None if controllable_anatomy_size is None else self.anatomy_size_conditions,
        )
        masks = [resample_to_grid(mask, output_size, spacing, order=0, fill=0) for mask in made.masks]
        for i, (mask, report) in enumerate(zip(masks, made.reports)):
            present = labels_present(np.asarray(mask.dataobj))
            asked = {name: one["ml"] for name, one in report["anatomy"].items() if "asked" in one}
            lost = [name for name, ml in asked.items() if ml and LABELS[name] not in present]
            if lost:
                warnings.warn(
                    f"label map {i} was made with {', '.join(lost)}, which is not on the grid {output_size} of "
                    f"{spacing} mm: use a larger field of view or a finer spacing, or another seed",
                    stacklevel=4,
                )
        return masks, made.reports

    def prepare_conditions(
        self,
        num_images: int,
        spacing: tuple[float, float, float],
        modality: int,
        body_region: list[str] | None,
        label_maps: list[nib.Nifti1Image] | None,
        device: torch.device,
        regions: list[tuple[int, int]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        What the UNet takes besides the latents.

        Args:
            regions: of the first and of the last slice, one pair (0..3) an image, where the mask database told.

        Returns:
            `class_labels` (N,), `spacing` (N, 3), `top_region_index` and `bottom_region_index` (N, 4), each where the
            model has it. `body_region`, where given, wins over the regions seen in the label maps, but not over those
            of the mask database, in which it was looked for.
        """
        dtype = self.unet.dtype
        conditions = {}
        if self.unet.class_embedding is not None:
            conditions["class_labels"] = torch.full((num_images,), modality, device=device)
        if self.unet.config.use_spacing:
            mm = torch.tensor(spacing, dtype=torch.float32, device=device) * CONDITION_SCALE
            conditions["spacing"] = mm.to(dtype).expand(num_images, -1)
        if self.unet.config.use_region_index:
            if regions is None and body_region:
                regions = [regions_from_words(body_region)] * num_images
            elif regions is None:
                regions = [regions_from_labels(labels_present(np.asarray(labels.dataobj))) for labels in label_maps]
                regions = regions * (num_images // len(regions))
            for i, name in enumerate(("top_region_index", "bottom_region_index")):
                vectors = np.stack([one_hot(pair[i]) for pair in regions])
                conditions[name] = torch.tensor(vectors, dtype=dtype, device=device) * CONDITION_SCALE
        return conditions

    def embed_label_maps(self, label_maps: list[np.ndarray], num_images: int, device: torch.device) -> torch.Tensor:
        """
        The ControlNet's embedding of the label maps, computed once for all steps.

        Args:
            label_maps: uint8 (X, Y, Z), one for all images or one an image.
            num_images: images of the batch.
            device: where the ControlNet runs.

        Returns:
            (N, C, X/4, Y/4, Z/4).
        """
        embeddings = []
        for labels in label_maps:
            bits = label_bits(torch.from_numpy(labels)[None].to(device), dtype=torch.uint8)
            embeddings.append(self.controlnet.embed_condition(bits))
        return torch.cat(embeddings).expand(num_images, *[-1] * 4)

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        condition_embedding: torch.Tensor | None,
        conditioning_scale: float,
    ) -> torch.Tensor:
        """Velocity or noise (N, C, X, Y, Z) at a timestep; the ControlNet takes part where there is an embedding."""
        latents = latents.to(self.unet.dtype)
        residuals = {}
        if condition_embedding is not None:
            # A ControlNet fine-tuned in float32 may steer a UNet in half precision.
            down_block_res_samples, mid_block_res_sample = self.controlnet(
                latents.to(self.controlnet.dtype),
                timestep,
                controlnet_cond_embedding=condition_embedding,
                conditioning_scale=conditioning_scale,
                class_labels=conditions.get("class_labels"),
                return_dict=False,
            )
            dtype = latents.dtype
            residuals["down_block_additional_residuals"] = tuple(sample.to(dtype) for sample in down_block_res_samples)
            residuals["mid_block_additional_residual"] = mid_block_res_sample.to(dtype)
        return self.unet(latents, timestep, **conditions, **residuals, return_dict=False)[0]

    def sample(
        self,
        latents: torch.Tensor,
        num_inference_steps: int,
        conditions: dict[str, torch.Tensor],
        embedding: torch.Tensor | None,
        uncond_conditions: dict[str, torch.Tensor],
        uncond_embedding: torch.Tensor | None,
        guidance_scale: float,
        controlnet_conditioning_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        edit: Edit | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """
        Noise to latents, both (N, C, X, Y, Z).

        Args:
            conditions: what the UNet takes besides the latents, see [`prepare_conditions`].
            embedding: of the label maps, if there are any, see [`embed_label_maps`].
            uncond_conditions, uncond_embedding: the same for the baseline of the guidance.
            edit: a CT to start from, if there is one.
            strength: how far it may change, 0 to 1.
        """
        timesteps = set_timesteps(self.scheduler, num_inference_steps, latents.device, latents[0, 0].numel())
        begin, constrain = 0, None
        if edit is not None:
            # Heun's solver has two timesteps a step, but one for the first.
            noise, begin = latents, first_step(strength, num_inference_steps) * self.scheduler.order
            noised = partial(add_noise, self.scheduler, edit.latents, noise)
            latents = noise if begin == 0 else noised(timesteps[begin])
            constrain = partial(edit.keep_the_rest, noised)

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            branches = [(conditions, embedding)]
            if guidance_scale > 0:
                branches.append((uncond_conditions, uncond_embedding))
            outputs = spread(
                [
                    partial(self.predict, latents, timestep, *branch, controlnet_conditioning_scale)
                    for branch in branches
                ],
                self.group,
            )
            if len(outputs) == 1:
                return outputs[0]
            conditional, unconditional = (output.float() for output in outputs)
            return unconditional + guidance_scale * (conditional - unconditional)

        return denoise(
            self,
            self.scheduler,
            predict,
            latents,
            timesteps,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            begin,
            constrain,
        )

    def decode(self, latents: torch.Tensor, modality: int, labels: np.ndarray | None) -> torch.Tensor:
        """
        Latents to HU; outside the body of the label map, air.

        Args:
            latents (1, C, X, Y, Z): as the sampling left them. One at a time: decoding takes the most memory of all.
            modality: its code decides on the intensity range.
            labels: uint8 (4X, 4Y, 4Z), or `None`.

        Returns:
            float32 (1, 1, 4X, 4Y, 4Z).

        Raises:
            ValueError: for what is not finite, which half precision can make of large numbers.
        """
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        image = to_hu(self.vae.decode(latents, return_dict=False)[0].float(), modality)
        if not image.isfinite().all():
            dtypes = " and ".join(sorted({str(network.dtype) for network in (self.unet, self.vae)}))
            raise ValueError(
                f"the image has voxels that are no finite numbers, computed in {dtypes}: load the model in bfloat16 "
                "or float32"
            )
        if labels is not None:
            image[0, 0][torch.from_numpy(labels == 0).to(image.device)] = background_value(modality)
        return image

    def check_quality(self, image: np.ndarray, labels: np.ndarray, modality: str | int | None = None) -> dict | None:
        """
        Whether the organs of a made CT have the median HU that they may have.

        Args:
            image: (X, Y, Z) in HU.
            labels: its label map (X, Y, Z), uint8.
            modality: what was made; the model's own if not given.

        Returns:
            what [`maisi_diffusers.anatomy.check_quality`] finds; `None` for MR, which has no such ranges.
        """
        if not is_ct(modality_code(self.config.modality if modality is None else modality)):
            return None
        return check_quality(image, labels, self.config.quality_thresholds, self.vocabulary)

    @torch.no_grad()
    def __call__(
        self,
        body_region: list[str] | None = None,
        anatomy_list: list[str] | None = None,
        controllable_anatomy_size: list[tuple[str, float]] | None = None,
        mask: str | os.PathLike | nib.Nifti1Image | None = None,
        image_only: bool = False,
        output_size: tuple[int, int, int] | None = None,
        spacing: tuple[float, float, float] | None = None,
        modality: str | int | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        controlnet_conditioning_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "nifti",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        anatomy_size: list[float] | None = None,
        mask_vocabulary: str = "maisi",
        body_image: str | os.PathLike | nib.Nifti1Image | None = None,
        restore_grid: bool = False,
        augment_mask: bool = True,
        quality_retries: int = 2,
        keep_only_anatomy_list: bool = False,
        image: str | os.PathLike | nib.Nifti1Image | None = None,
        strength: float = 1.0,
        repaint_labels: list[int | str] | None = None,
        feather: float = FEATHER,
        quality_check: bool = True,
    ) -> MaisiCTPipelineOutput | tuple:
        r"""
        Args:
            body_region: words for the regions to show: head, chest (thorax), abdomen, pelvis (lower). With nothing
                that says what the label map is, one that shows them is looked up in the mask database.
            anatomy_list: names of labels: a label map that has them, and no tumor that is not among them, is looked up
                in the mask database, with `body_region` where given.
            controllable_anatomy_size: pairs of name and size, e.g. `[("liver", 0.5), ("hepatic tumor", 0.3)]`: a label
                map is generated.
            mask: the user's own label map: path or nibabel image, integers, any orientation and affine.
            image_only: no label map and no ControlNet.
            output_size: voxels along X, Y, Z; if not given, with `mask` the nearest allowed grid with its field of
                view, otherwise what suits the region (published model) and modality (MR) or is the model's own. A
                label map that is looked up has this size and spacing, or is the nearest that is resampled to them.
            spacing: mm along X, Y, Z; if not given, what keeps that field of view.
            modality: name or code, e.g. `"ct"`, `"ct_contrast"`, `"t1"`; the model's own if not given.
            num_images: images to make, all at once.
            num_inference_steps: as many as the model was released with if not given.
            guidance_scale: `uncond + s * (cond - uncond)`; 0 is off. "uncond" is without modality, and with a label
                map without its tumors. If not given what the model was released with, for CT 0.
            controlnet_conditioning_scale: factor on what the ControlNet adds.
            generator: one, or one an image, for the same result again.
            latents (N, C, X/4, Y/4, Z/4): the initial noise instead of drawing it.
            output_type: `"nifti"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: return a [`MaisiCTPipelineOutput`] instead of a tuple `(images, labels, reports)`.
            callback_on_step_end: called after every step as `callback(pipe, step, timestep, {"latents": ...})`;
                setting `pipe._interrupt = True` in it ends the run early.
            callback_on_step_end_tensor_inputs: `["latents"]` or `[]`.
            anatomy_size: the whole vector of 10 sizes instead of `controllable_anatomy_size`.
            mask_vocabulary: whose labels `mask` has: `"maisi"` or `"totalsegmentator"` (v2, `total`).
            body_image: the CT that `mask` was drawn on; gives the outline of the body where `mask` has no label 200.
            restore_grid: put images and labels back on the grid of `mask`.
            augment_mask: make a variant of a label map that was looked up: zoomed a little, or its tumor moved and
                deformed inside of its organ.
            quality_retries: how many times an image that fails [`check_quality`] is made again with fresh noise,
                before the last one is taken as it is (published: 2). Images without a label map, of MR and as latents
                are not checked; those of your own `latents` are not made again.
            keep_only_anatomy_list: return labels of nothing but `anatomy_list` or the names in
                `controllable_anatomy_size`. The image is made of all.
            image: a CT to start from, on the grid of `mask`, which says what it is to show; see docs/edit.md. Images
                and labels are returned on that grid.
            strength: how far it may change: 0 leaves it as it is, 1 starts from noise alone.
            repaint_labels: paint these labels of `mask` anew, and nothing else: beyond `feather` around them the CT
                stays the same to the voxel.
            feather: mm around `repaint_labels` in which the new image passes into the given one.
            quality_check: check the images; `False` takes them as they are.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: arguments that are unknown, out of range or contradict each other, before any network runs.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if num_inference_steps is None:
            num_inference_steps = self.own_num_inference_steps(image_only)
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        modality = modality_code(self.config.modality if modality is None else modality)
        self._interrupt = False
        if image is not None and body_image is None and is_ct(modality):  # the outline in MR cannot be told so
            body_image = image

        # 1. Check inputs; a label map on the wanted grid is one of them
        check_edit(image, mask, strength, repaint_labels, feather, output_type, self.scheduler)
        self.check_inputs(
            body_region,
            anatomy_list,
            controllable_anatomy_size,
            anatomy_size,
            mask,
            mask_vocabulary,
            body_image,
            image_only,
            output_size,
            spacing,
            modality,
            guidance_scale,
            controlnet_conditioning_scale,
            output_type,
            restore_grid,
        )
        if self.group is not None and generator is None:
            raise ValueError(
                "processes that make an image together need the same noise: give generator=, seeded alike in each"
            )
        if not isinstance(quality_retries, Integral) or quality_retries < 0:
            raise ValueError(f"quality_retries={quality_retries!r} is not allowed: give a whole number, 0 or more")
        kept = [*(anatomy_list or []), *(name for name, size in controllable_anatomy_size or [] if size >= 0)]
        if keep_only_anatomy_list and not kept:
            raise ValueError(
                "keep_only_anatomy_list=True keeps the labels of anatomy_list or controllable_anatomy_size, and there "
                "is neither: give one, or leave it out"
            )
        label_maps = regions = None
        if mask is not None:
            own_label_map = self.load_mask(mask, mask_vocabulary, body_image)
            label_maps = [self.prepare_mask(own_label_map, output_size, spacing)]
            output_size, spacing = label_maps[0].shape, spacing_of(label_maps[0])
        else:
            output_size, spacing = self.choose_grid(body_region, modality, output_size, spacing)
            check_grid(output_size, spacing, self.size_multiple, self.config.input_rules)
        ratio = self.vae.spatial_compression_ratio
        latent_shape = (num_images, self.unet.config.in_channels, *(size // ratio for size in output_size))
        check_sampling(
            self.scheduler,
            self.config.prediction_type,
            num_images,
            num_inference_steps,
            generator,
            latents,
            latent_shape,
            output_type,
            callback_on_step_end_tensor_inputs,
        )

        # 2. Generate label maps where sizes were asked for, look them up where only what they are to show
        label_map_reports = [None] * num_images
        if controllable_anatomy_size is not None or anatomy_size is not None:
            label_maps, label_map_reports = self.generate_masks(
                controllable_anatomy_size, anatomy_size, num_images, generator, output_size, spacing
            )
        elif mask is None and not image_only:
            label_maps, regions, label_map_reports = self.look_up_masks(
                body_region, anatomy_list, num_images, generator, output_size, spacing, augment_mask
            )

        label_maps, regions, label_map_reports = of_first([label_maps, regions, label_map_reports], self.group)

        self.warn_of_unusual_fov(label_maps, body_region, modality, output_size, spacing)
        device = self._execution_device
        for network in (self.vae, self.unet, self.controlnet):
            if network is not None:
                network.lay_out(device)
        edit = repainted = None
        if repaint_labels is not None:
            indices = [label_index(one, self.vocabulary) for one in repaint_labels]
            repainted = {index: label_name(index, self.vocabulary) for index in indices}
        if image is not None:
            edit = prepare_edit(image, own_label_map, label_maps[0], repainted, feather, self.vae, modality, device)

        # 3. Prepare conditions
        conditions = self.prepare_conditions(num_images, spacing, modality, body_region, label_maps, device, regions)
        uncond_conditions = dict(conditions)
        if "class_labels" in conditions:
            uncond_conditions["class_labels"] = torch.zeros_like(conditions["class_labels"])
        arrays = embedding = uncond_embedding = None
        has_baseline = "class_labels" in conditions  # for the guidance, other than what it guides
        if label_maps is not None:
            arrays = [np.asarray(labels.dataobj) for labels in label_maps]
            embedding = self.embed_label_maps(arrays, num_images, device)
            if guidance_scale > 0:
                without_tumors = [remove_tumors(array, spacing, self.tumors) for array in arrays]
                uncond_embedding = embedding
                if not all(map(np.array_equal, arrays, without_tumors)):
                    has_baseline = True
                    uncond_embedding = self.embed_label_maps(without_tumors, num_images, device)
                del without_tumors
        if guidance_scale > 0 and not has_baseline:
            warnings.warn(
                f"guidance_scale={guidance_scale} does nothing here: this model is not told the modality, and there "
                "is no tumor to be without",
                stacklevel=3,
            )
            guidance_scale = 0

        # 4. Make the images, and with fresh noise those again that fail the quality check
        images, qualities, attempts = [None] * num_images, [None] * num_images, [0] * num_images
        wanted = [] if image is not None and strength == 0 else list(range(num_images))
        while wanted:
            rows = slice(None) if len(wanted) == num_images else wanted
            generators = [generator[i] for i in wanted] if isinstance(generator, list) else generator
            noise = prepare_latents((len(wanted), *latent_shape[1:]), device, generators, latents)
            made = self.sample(
                latents_of_first(noise, self.group),
                num_inference_steps,
                {name: values[rows] for name, values in conditions.items()},
                None if embedding is None else embedding[rows],
                {name: values[rows] for name, values in uncond_conditions.items()},
                None if uncond_embedding is None else uncond_embedding[rows],
                guidance_scale,
                controlnet_conditioning_scale,
                generators,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                edit,
                strength,
            )
            made = latents_of_first(made, self.group)
            for i, latent in zip(wanted, made.split(1)):
                attempts[i] += 1
                if output_type == "latent":
                    images[i] = latent
                    continue
                labels = None if arrays is None else arrays[i % len(arrays)]
                images[i] = self.decode(latent, modality, labels)
                hu = images[i][0, 0].cpu().numpy()
                if output_type != "pt":
                    images[i] = hu  # not on the device, where the next one needs the memory
                if labels is not None and quality_check:
                    # Of a CT that is repainted in part, only what is new can be at fault.
                    checked = labels if repainted is None else np.where(np.isin(labels, list(repainted)), labels, 0)
                    qualities[i] = self.check_quality(hu, checked, modality)
            is_final = attempts[wanted[0]] > quality_retries or latents is not None or self.interrupt
            failed = [i for i in wanted if qualities[i] is not None and not qualities[i]["passed"]]
            if is_final:
                for i in failed:
                    warnings.warn(f"image {i}: {describe_outliers(qualities[i], attempts[i])}", stacklevel=3)
            wanted = [] if is_final else failed
        reconstruction = None
        if repainted is not None and strength > 0:
            reconstruction = self.decode(edit.latents, modality, arrays[0])[0, 0].cpu().numpy()
        self.maybe_free_model_hooks()

        # 5. Output
        if keep_only_anatomy_list:
            indices = [label_index(name, self.vocabulary) for name in kept]
            label_maps = [
                labels_to_nifti(np.where(np.isin(array, indices), array, 0), label_map.affine)
                for array, label_map in zip(arrays, label_maps)
            ]
        labels = None if label_maps is None else [label_maps[i % len(label_maps)] for i in range(num_images)]
        if output_type == "nifti":
            affine = spacing_affine(spacing) if labels is None else labels[0].affine
            if edit is not None and strength == 0:
                images = [np.asarray(edit.image.dataobj)] * num_images
                affine = edit.image.affine
            images = [ct_to_nifti(made, affine) for made in images]
            if edit is not None:
                labels = [own_label_map] * num_images  # to the voxel, too
                if strength > 0:
                    images = [edit.compose(made, reconstruction) for made in images]
            elif restore_grid:
                air = background_value(modality)
                labels = [resample_like(label_map, own_label_map, order=0, fill=0) for label_map in labels]
                images = [resample_like(image, own_label_map, order=1, fill=air) for image in images]
                images = [
                    ct_to_nifti(np.where(label_map.dataobj, image.dataobj, air), image.affine)
                    for image, label_map in zip(images, labels)
                ]
            if labels is not None:
                labels = [labels_to_nifti(np.asarray(label_map.dataobj), label_map.affine) for label_map in labels]
        else:
            if labels is not None:
                labels = np.stack([np.asarray(label_map.dataobj) for label_map in labels])
                labels = labels if output_type == "np" else torch.from_numpy(labels)[:, None].to(device)
            images = np.stack(images) if output_type == "np" else torch.cat(images)

        reports = [
            {"label_map": label_map, "quality": quality, "attempts": number}
            for label_map, quality, number in zip(label_map_reports, qualities, attempts)
        ]
        if not return_dict:
            return (images, labels, reports)
        return MaisiCTPipelineOutput(images=images, labels=labels, reports=reports)
