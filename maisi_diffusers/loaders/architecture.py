"""The architecture of a published model: from its own network configuration, or as released."""

import copy
import json
from pathlib import Path

# What the released models have, in terms of our classes, whose defaults are those of `rflow-ct`.
DDPM_ATTENTION = {"resnet_updown": False, "num_class_embeds": None, "attention_out_proj": False}
MASK_SCALING_FACTOR = 1.0055984258651733
MASK_NETWORKS = {
    "mask_vae": {
        "in_channels": 8,
        "out_channels": 125,
        "block_out_channels": (32, 64, 128),
        "layers_per_block": (1, 2, 2),
        "use_conv_transpose": True,
        "scaling_factor": MASK_SCALING_FACTOR,
    },
    "mask_unet": {
        "resnet_updown": False,
        "num_class_embeds": None,
        "use_spacing": False,
        "cross_attention_dim": 10,
        "upcast_attention": True,
    },
    "mask_latent_size": [64, 64, 64],
    "mask_scheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    },
}
RELEASED = {
    "rflow": {
        "vae": {},
        "unet": {},
        "controlnet": {},
        "scheduler": {"scale": 1.4, "monai_rounding": True},
        **MASK_NETWORKS,
    },
    "ddpm": {
        "vae": {},
        "unet": {**DDPM_ATTENTION, "use_region_index": True},
        "controlnet": DDPM_ATTENTION,
        "scheduler": MASK_NETWORKS["mask_scheduler"],
        **MASK_NETWORKS,
    },
}

# Fields of the published schema that change no number here: how MONAI spends memory, and names we know already.
WITHOUT_EFFECT = {
    "_target_",
    "use_flash_attention",
    "use_checkpointing",
    "norm_float16",
    "num_splits",
    "dim_split",
    "print_info",
    "save_mem",
}
# Options of MONAI that no published model uses, by the only value that is supported.
UNSUPPORTED_UNLESS = {
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "use_combined_linear": False,
    "dropout_cattn": 0.0,
    "spatial_dims": 3,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
}
VAE_FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "num_channels": "block_out_channels",
    "num_res_blocks": "layers_per_block",
    "norm_num_groups": "norm_num_groups",
    "norm_eps": "norm_eps",
    "use_convtranspose": "use_conv_transpose",
}
UNET_FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_channels": "block_out_channels",
    "channels": "block_out_channels",
    "num_res_blocks": "layers_per_block",
    "attention_levels": "attention_levels",
    "num_head_channels": "attention_head_dim",
    "norm_num_groups": "norm_num_groups",
    "norm_eps": "norm_eps",
    "resblock_updown": "resnet_updown",
    "include_fc": "attention_out_proj",
    "num_class_embeds": "num_class_embeds",
    "include_spacing_input": "use_spacing",
    "include_top_region_index_input": "use_region_index",
    "include_bottom_region_index_input": "use_region_index",
    "cross_attention_dim": "cross_attention_dim",
    "transformer_num_layers": "transformer_layers_per_block",
    "upcast_attention": "upcast_attention",
    "conditioning_embedding_in_channels": "conditioning_channels",
    "conditioning_embedding_num_channels": "conditioning_embedding_out_channels",
}
RFLOW_FIELDS = {
    name: name
    for name in (
        "num_train_timesteps",
        "use_discrete_timesteps",
        "sample_method",
        "loc",
        "scale",
        "use_timestep_transform",
        "base_img_size_numel",
        "steps_offset",
    )
}
DDPM_FIELDS = {
    "num_train_timesteps": "num_train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "schedule": "beta_schedule",
    "clip_sample": "clip_sample",
}
# MONAI's own defaults where a configuration leaves a field out and ours differ.
UNET_DEFAULTS = {
    "num_class_embeds": None,
    "resnet_updown": False,
    "use_spacing": False,
    "use_region_index": False,
    "attention_head_dim": 8,
}
# MONAI's MAISI networks leave the attention output layer out, its plain UNet has it.
OUT_PROJ_DEFAULT = {"unet": False, "controlnet": False, "mask_unet": True}
SECTIONS = {
    "vae": "autoencoder_def",
    "unet": "diffusion_unet_def",
    "controlnet": "controlnet_def",
    "scheduler": "noise_scheduler",
    "mask_vae": "mask_generation_autoencoder_def",
    "mask_unet": "mask_generation_diffusion_def",
    "mask_scheduler": "mask_generation_noise_scheduler",
}

# A field that only the mask UNet of mask_generation_diffusion_unet_v2.pt has, which is a network of another kind.
LATER_MASK_UNET = "adagn_condition_dim"


def read_architecture(folder: Path, kind: str) -> dict[str, dict | list[int]]:
    """
    The configuration of every component, by its name in the pipeline, and `mask_latent_size`.

    Args:
        folder: the checkpoint's folder; `configs/config_network_{kind}.json` in it wins over the released one.
        kind: `"rflow"` or `"ddpm"`.

    Raises:
        ValueError: for a file that is not JSON, a field that is not known or an option that is not supported; names
            file and field.
    """
    architecture = copy.deepcopy(RELEASED[kind])
    path = folder / "configs" / f"config_network_{kind}.json"
    if not path.is_file():
        return architecture

    try:
        published = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again, in a clone by `git lfs pull`") from error
    if not isinstance(published, dict):
        raise ValueError(f"{path} holds a {type(published).__name__}, not an object of networks: download it again")
    for section in SECTIONS.values():
        if section in published and not isinstance(published[section], dict):
            raise ValueError(f"{path}: {section} is no object of fields: download the file again")
    if LATER_MASK_UNET in published.get(SECTIONS["mask_unet"], {}):
        # Of another file than the one that is read, whose networks are as they were released.
        del published[SECTIONS["mask_unet"]]
        published.pop(SECTIONS["mask_scheduler"], None)
    for name, section in SECTIONS.items():
        if section not in published:
            continue
        fields = _resolve_references(published[section], published, path)
        if name.endswith("scheduler"):
            architecture[name] = _scheduler_config(fields, kind if name == "scheduler" else "ddpm", path)
        elif name.endswith("vae"):
            architecture[name] = _vae_config(fields, path)
        else:
            architecture[name] = _unet_config(fields, name, path)
    architecture["mask_vae"]["scaling_factor"] = published.get("mask_generation_scale_factor", MASK_SCALING_FACTOR)
    if "mask_generation_latent_shape" in published:
        architecture["mask_latent_size"] = published["mask_generation_latent_shape"][1:]  # without the channels
    return architecture


def _resolve_references(value, root: dict, path: Path):
    """`"@name"` stands for the top-level entry of that name."""
    if isinstance(value, str) and value.startswith("@"):
        if value[1:] not in root:
            raise ValueError(f"{path}: {value!r} refers to an entry that the file does not have: add it")
        return _resolve_references(root[value[1:]], root, path)
    if isinstance(value, dict):
        return {key: _resolve_references(entry, root, path) for key, entry in value.items()}
    return value


def _translate(fields: dict, names: dict[str, str], path: Path) -> dict:
    config = {}
    for field, value in fields.items():
        if field in names:
            value = tuple(value) if isinstance(value, list) else value
            if config.setdefault(names[field], value) != value:
                raise ValueError(
                    f"{path}: {field}={value} contradicts another field for {names[field]}={config[names[field]]}: "
                    "published models give both the same value"
                )
        elif field in UNSUPPORTED_UNLESS:
            if value != UNSUPPORTED_UNLESS[field]:
                raise ValueError(
                    f"{path}: {field}={value} is not supported, only {UNSUPPORTED_UNLESS[field]}: "
                    "no published model uses it"
                )
        elif field not in WITHOUT_EFFECT:
            raise ValueError(f"{path}: the field {field}={value} is not known: remove it if it changes nothing")
    return config


def _vae_config(fields: dict, path: Path) -> dict:
    fields = dict(fields)
    if any(fields.pop("attention_levels", ())):
        raise ValueError(f"{path}: a VAE with attention_levels is not supported: no published model has one")
    return _translate(fields, VAE_FIELDS, path)


def _unet_config(fields: dict, name: str, path: Path) -> dict:
    fields = dict(fields)
    fields.pop("with_conditioning", None)  # said again by cross_attention_dim
    return {
        **(
            UNET_DEFAULTS
            if name != "controlnet"
            else {key: UNET_DEFAULTS[key] for key in ("num_class_embeds", "resnet_updown", "attention_head_dim")}
        ),
        "attention_out_proj": OUT_PROJ_DEFAULT[name],
        **_translate(fields, UNET_FIELDS, path),
    }


def _scheduler_config(fields: dict, kind: str, path: Path) -> dict:
    if kind == "rflow":
        defaults = {"use_timestep_transform": False, "use_discrete_timesteps": True}
        return {**defaults, "monai_rounding": True, **_translate(fields, RFLOW_FIELDS, path)}
    config = {"clip_sample": True, **_translate(fields, DDPM_FIELDS, path)}
    config["beta_schedule"] = config.get("beta_schedule", "linear_beta").removesuffix("_beta")
    return config
