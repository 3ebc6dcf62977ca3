"""The published checkpoints as components of a pipeline."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, ModelMixin
from diffusers.utils import logging

from ..models import AutoencoderKLMaisi, MaisiControlNetModel, MaisiUNet3DConditionModel
from ..schedulers import MaisiRFlowScheduler
from .architecture import read_architecture
from .key_mapping import unet_source_keys, vae_source_keys
from .repository import Repository
from .safe_torch import load_torch_file

logger = logging.get_logger(__name__)

CT_REPO = "nvidia/NV-Generate-CT"
MASK_FILES = {
    "mask_vae": ("models/mask_generation_autoencoder.pt",),
    "mask_unet": ("models/mask_generation_diffusion_unet.pt",),
}


def _anatomy_files(number: int) -> dict[str, str]:
    """Published names; the list goes by the number of its label maps."""
    return {
        "candidates": f"datasets/candidate_masks_flexible_size_and_spacing_{number}.json",
        "masks": "datasets/all_masks_flexible_size_and_spacing_4000",
        "size_conditions": "datasets/all_anatomy_size_conditions.json",
    }


@dataclass(frozen=True)
class Version:
    """
    A published model.

    Args:
        kind: `"rflow"` or `"ddpm"`.
        files: for every component the names its file goes by, the newest first.
        vae_repo: the Hub repository of the VAE, where it is not the model's own.
        anatomy: the files of the mask database and of the anatomy sizes, where it has them: `candidates`, the list of
            label maps; `masks`, the folder of these or, with ".zip" added, the archive; `size_conditions`.
        guidance_scale: what it was released with.
    """

    kind: str
    files: dict[str, tuple[str, ...]]
    vae_repo: str | None = None
    anatomy: dict[str, str] | None = None
    guidance_scale: float = 0.0


VERSIONS = {
    "rflow-ct": Version(
        "rflow",
        {
            "vae": ("models/autoencoder_v1.pt",),
            "unet": ("models/diff_unet_3d_rflow-ct.pt",),
            "controlnet": ("models/controlnet_3d_rflow-ct.pt",),
            **MASK_FILES,
        },
        anatomy=_anatomy_files(4000),
    ),
    "ddpm-ct": Version(
        "ddpm",
        {
            "vae": ("models/autoencoder_v1.pt", "models/autoencoder_epoch273.pt"),
            "unet": (
                "models/diff_unet_3d_ddpm-ct.pt",
                "models/input_unet3d_data-all_steps1000size512ddpm_random_current_inputx_v1.pt",
            ),
            "controlnet": (
                "models/controlnet_3d_ddpm-ct.pt",
                "models/controlnet-20datasets-e20wl100fold0bc_noi_dia_fsize_current.pt",
            ),
            **MASK_FILES,
        },
        anatomy=_anatomy_files(3000),
    ),
    "rflow-mr": Version(
        "rflow",
        {"vae": ("models/autoencoder_v2.pt",), "unet": ("models/diff_unet_3d_rflow-mr.pt",)},
        guidance_scale=15.0,
    ),
    "rflow-mr-brain": Version(
        "rflow",
        {"vae": ("models/autoencoder_v1.pt",), "unet": ("models/diff_unet_3d_rflow-mr-brain_v1.pt",)},
        vae_repo=CT_REPO,
        guidance_scale=2.0,
    ),
}
REQUIRED = ("vae", "unet")


def find_checkpoint(source: str | os.PathLike, version: str, **hub_kwargs) -> Repository:
    """
    Where a published model is: a folder, or a Hub repository at one commit, so that all that is read from it belongs
    together. Its UNet is downloaded.

    Args:
        source: a folder in the published layout, or a Hub repository id.
        version: `rflow-ct`, `ddpm-ct`, `rflow-mr` or `rflow-mr-brain`.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: a source that is not there, or a Hub that cannot be reached.
        ValueError: an unknown version.
    """
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} is not known: use one of {', '.join(VERSIONS)}")
    return Repository(source, **hub_kwargs).pinned(*VERSIONS[version].files["unet"])


def load_maisi_checkpoint(
    source: str | os.PathLike,
    version: str,
    torch_dtype: torch.dtype = torch.float32,
    strict: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> dict[str, ModelMixin | MaisiRFlowScheduler | DDPMScheduler | list[int]]:
    """
    Read a published model into the components of [`MaisiCTPipeline`].

    One file at a time is in memory besides what is built already, and its tensors become the model's.

    Args:
        source: a folder in the published layout, or a Hub repository id.
        version: `rflow-ct`, `ddpm-ct`, `rflow-mr` or `rflow-mr-brain`.
        torch_dtype: dtype of the networks.
        strict: an unexpected key is an error; otherwise it is dropped with a warning.
        revision: branch, tag or commit of a Hub repository.
        token: for a private or gated Hub repository.
        cache_dir: where downloads are kept.
        local_files_only: read what was downloaded before and do not ask the Hub.

    Returns:
        components by name; ControlNet and mask networks where the source has their files, the latter with the
        `mask_latent_size` they were trained for.

    Raises:
        FileNotFoundError: a source or a required file that is not there, or a Hub that cannot be reached.
        ValueError: an unknown version; a damaged or unsafe file; a key missing or unexpected or of another shape.
    """
    hub_kwargs = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    repository = find_checkpoint(source, version, revision=revision, **hub_kwargs)
    spec = VERSIONS[version]
    folders = _find_folders(repository, spec)
    paths = {name: _find_file(folders[name], names) for name, names in spec.files.items()}
    for name in REQUIRED:
        if paths[name] is None:
            raise FileNotFoundError(
                f"{folders[name]} has no {spec.files[name][0]}, the {name} of {version}: download it there, or check "
                "that `version` is the one of this checkpoint"
            )
    architecture = read_architecture(folders["unet"], spec.kind)
    if paths.get("mask_vae") is not None and paths["mask_unet"] is None:
        logger.warning(
            f"{folders['unet']} has no {MASK_FILES['mask_unet'][0]}, so that the pipeline makes no label maps; the "
            "network of mask_generation_diffusion_unet_v2.pt is of another kind, which is not supported"
        )

    components = {}
    unet = _read_unet(architecture["unet"], paths["unet"], strict, torch_dtype)
    components["unet"], scaling_factor = unet
    components["vae"] = _read_vae(
        {**architecture["vae"], "scaling_factor": scaling_factor}, paths["vae"], strict, torch_dtype
    )
    if paths.get("controlnet") is not None:
        components["controlnet"] = _read_controlnet(
            architecture["controlnet"], paths["controlnet"], components["unet"], strict, torch_dtype
        )
    scheduler_class = MaisiRFlowScheduler if spec.kind == "rflow" else DDPMScheduler
    components["scheduler"] = scheduler_class(**architecture["scheduler"])

    if paths.get("mask_vae") is not None and paths.get("mask_unet") is not None:
        components["mask_unet"], scaling_factor = _read_unet(
            architecture["mask_unet"],
            paths["mask_unet"],
            strict,
            torch_dtype,
            default_scaling_factor=architecture["mask_vae"]["scaling_factor"],
        )
        components["mask_vae"] = _read_vae(
            {**architecture["mask_vae"], "scaling_factor": scaling_factor}, paths["mask_vae"], strict, torch_dtype
        )
        components["mask_scheduler"] = DDPMScheduler(**architecture["mask_scheduler"])
        components["mask_latent_size"] = architecture["mask_latent_size"]
    return components


def _find_folders(repository: Repository, spec: Version) -> dict[str, Path]:
    """The local folder that each component's file is looked for in; Hub repositories are downloaded first."""

    def fetch(repository: Repository, components: list[str]) -> Path:
        patterns = [name for component in components for name in spec.files[component]]
        if "unet" in components:
            patterns.append(f"configs/config_network_{spec.kind}.json")
        return repository.fetch(*patterns)

    if os.path.isdir(repository.source):
        return dict.fromkeys(spec.files, Path(repository.source))
    own = [name for name in spec.files if name != "vae" or spec.vae_repo is None]
    folders = dict.fromkeys(own, fetch(repository, own))
    if spec.vae_repo is not None:
        # A revision of the model's own repository says nothing about another's.
        folders["vae"] = fetch(replace(repository, source=spec.vae_repo, revision=None), ["vae"])
    return folders


def _find_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_vae(config: dict, path: Path, strict: bool, dtype: torch.dtype) -> AutoencoderKLMaisi:
    checkpoint = load_torch_file(path)
    weights = _section(checkpoint, "unet_state_dict", path) if "unet_state_dict" in checkpoint else checkpoint
    with init_empty_weights():
        model = AutoencoderKLMaisi(**config)
    layers = [len(block.resnets) for block in model.encoder.down_blocks]
    return _fill(model, weights, path, lambda name: vae_source_keys(name, tuple(layers)), strict, dtype)


def _read_unet(
    config: dict, path: Path, strict: bool, dtype: torch.dtype, default_scaling_factor: float | None = None
) -> tuple[MaisiUNet3DConditionModel, float]:
    """The UNet, and the scale factor that the published files keep beside it."""
    checkpoint = load_torch_file(path)
    weights = _section(checkpoint, "unet_state_dict", path)
    scaling_factor = checkpoint.get("scale_factor", default_scaling_factor)
    if scaling_factor is None:
        raise ValueError(
            f"{path} has no 'scale_factor', without which latents cannot be decoded: give the released file"
        )
    if isinstance(scaling_factor, torch.Tensor):
        scaling_factor = scaling_factor.squeeze().tolist()
    if (
        isinstance(scaling_factor, bool)
        or not isinstance(scaling_factor, (int, float))
        or not 0 < scaling_factor < math.inf
    ):
        raise ValueError(
            f"{path}: 'scale_factor' is {scaling_factor!r}, not a positive number: give the released file"
        )
    with init_empty_weights():
        model = MaisiUNet3DConditionModel(**config)
    return _fill(model, weights, path, unet_source_keys, strict, dtype), float(scaling_factor)


def _read_controlnet(
    config: dict, path: Path, unet: MaisiUNet3DConditionModel, strict: bool, dtype: torch.dtype
) -> MaisiControlNetModel:
    """The ControlNet; what its file lacks is the UNet's, as published."""
    weights = _section(load_torch_file(path), "controlnet_state_dict", path)
    with init_empty_weights():
        model = MaisiControlNetModel(**config)
    return _fill(model, weights, path, unet_source_keys, strict, dtype, fallback=unet.state_dict())


def _section(checkpoint: dict, key: str, path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file; emptied by whoever reads them."""
    if not isinstance(checkpoint.get(key), dict):
        found = ", ".join(f"{name!r} ({type(value).__name__})" for name, value in list(checkpoint.items())[:5])
        raise ValueError(
            f"{path} has no {key!r} with weights, only {found or 'nothing'}: give the released file of this part"
        )
    return checkpoint[key]


def _fill(
    model: ModelMixin,
    weights: dict[str, torch.Tensor],
    path: Path,
    source_keys: Callable[[str], tuple[str, ...]],
    strict: bool,
    dtype: torch.dtype,
    fallback: dict[str, torch.Tensor] | None = None,
) -> ModelMixin:
    """
    Give a model on the meta device its weights, every key of the file accounted for.

    Args:
        model: on the meta device.
        weights: of the file, by published key; emptied on the way, so that a tensor is not held twice.
        path: for messages.
        source_keys: the published keys of one of our names.
        strict: whether an unexpected key is an error.
        dtype: of the model.
        fallback: weights by our name, for those that the file lacks; of use where the shape is the same, which that
            of the UNet's time_emb_proj.weight is not, since it reads the spacing too.
    """
    filled, missing = {}, []
    for name, own in model.state_dict().items():
        keys = source_keys(name)
        if all(key in weights for key in keys):
            shape = (own.shape[0] // len(keys), *own.shape[1:])
            for key in keys:
                if not isinstance(weights[key], torch.Tensor):
                    raise ValueError(
                        f"{path}: {key} is a {type(weights[key]).__name__}, not a tensor: give the released file"
                    )
                if not weights[key].is_floating_point() or not weights[key].isfinite().all():
                    raise ValueError(
                        f"{path}: {key} holds {weights[key].dtype} or values that are not finite: "
                        "give the released file"
                    )
                if weights[key].shape != shape:
                    raise ValueError(
                        f"{path}: {key} has shape {tuple(weights[key].shape)}, but the architecture wants {shape}: "
                        "the file belongs to another model, or its configs/config_network_*.json is missing"
                    )
            parts = [weights.pop(key) for key in keys]
            filled[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
        elif fallback is not None and name in fallback and fallback[name].shape == own.shape:
            filled[name] = fallback[name].clone()
        else:
            missing += [key for key in keys if key not in weights]

    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} key(s) of this architecture: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}: the file is of another model or incomplete"
        )
    if weights:
        surplus = f"{path} has {len(weights)} unexpected key(s): {', '.join(map(str, list(weights)[:5]))}" + (
            ", ..." if len(weights) > 5 else ""
        )
        if strict:
            raise ValueError(f"{surplus}: the file is of another model; strict=False drops them")
        logger.warning(f"{surplus}: dropped")
    model.load_state_dict(filled, assign=True)
    return model.eval().requires_grad_(True)
