"""A tiny published checkpoint, and the ways in which one can be wrong."""

import io
import json
import operator
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from tests.parity.monai_reference import Size

# Large enough for every kind of key.
TINY = Size([32, 32], [1, 1], [False, True], [0, 32], [32, 32, 32], [1, 1, 1], (4, 4, 4))
FILES = {
    "vae": "models/autoencoder_v1.pt",
    "unet": "models/diff_unet_3d_rflow-ct.pt",
    "controlnet": "models/controlnet_3d_rflow-ct.pt",
    "mask_vae": "models/mask_generation_autoencoder.pt",
    "mask_unet": "models/mask_generation_diffusion_unet.pt",
}
CONFIG = "configs/config_network_rflow.json"
# One key of each network; the ControlNet's is none that the UNet could lend.
KEYS = {
    "vae": "decoder.blocks.5.norm1.weight",
    "unet": "down_blocks.1.attentions.0.attn.to_q.weight",
    "controlnet": "controlnet_mid_block.conv.bias",
    "mask_vae": "quant_conv_log_sigma.conv.weight",
    "mask_unet": "time_embed.0.weight",
}


def weights_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The state dict, wherever it is in the file."""
    return checkpoint.get("unet_state_dict") or checkpoint.get("controlnet_state_dict") or checkpoint


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """Save a file again after a change, in place or by a return value; files that share its data keep it."""
    checkpoint = torch.load(path, weights_only=True)
    changed = change(checkpoint)
    path.unlink()
    torch.save(checkpoint if changed is None else changed, path)


def remove_weights(path: Path, keys: list[str]) -> None:
    """Save a file again without some of its weights."""

    def change(checkpoint: dict) -> None:
        weights = weights_of(checkpoint)
        for key in keys:
            del weights[key]

    rewrite(path, change)


def rewrite_config(folder: Path, change: Callable[[dict], object]) -> None:
    """Write the configuration again after a change in place."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.unlink()
    path.write_text(json.dumps(config))


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# Objects that make a file when they are unpickled, by the name that is to be refused.
CODE = {
    "posix.system": lambda marker: Runs(os.system, f"touch {marker}"),
    "eval": lambda marker: Runs(eval, f"open({str(marker)!r}, 'w').close()"),
    "shutil.copyfile": lambda marker: Runs(shutil.copyfile, __file__, marker),
    "getattr": lambda marker: Runs(Path.touch, marker),
    "torch.storage._load_from_bytes": lambda marker: Runs(
        torch.storage._load_from_bytes, _torch_file(Runs(os.system, f"touch {marker}"))
    ),
    "numpy._core.multiarray._reconstruct": lambda marker: np.array([Runs(os.system, f"touch {marker}")], dtype=object),
}
MARKER = "the-code-has-run"


def with_metadata(tensor: torch.Tensor, value: object) -> MetaTensor:
    """MONAI's tensor with an object in its metadata."""
    return MetaTensor(tensor, affine=torch.eye(4), meta={"filename_or_obj": value})


@dataclass(frozen=True)
class Broken:
    """
    A way in which a checkpoint can be wrong.

    Args:
        change: spoils a folder of hard links.
        error: the error it must end in.
        says: what the message must contain, besides being one line.
    """

    change: Callable[[Path], None]
    error: type[Exception]
    says: tuple[str, ...]


def _in_file(component: str, change: Callable[[dict], object], *says: str) -> Broken:
    return Broken(lambda folder: rewrite(folder / FILES[component], change), ValueError, (FILES[component], *says))


def _in_weight(component: str, change: Callable[[torch.Tensor], object], *says: str) -> Broken:
    key = KEYS[component]

    def change_weight(checkpoint: dict) -> None:
        weights = weights_of(checkpoint)
        weights[key] = change(weights[key])

    return _in_file(component, change_weight, key, *says)


def _with_bytes(name: str, change: Callable[[bytes], bytes], *says: str) -> Broken:
    def change_file(folder: Path) -> None:
        data = change((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).write_bytes(data)

    return Broken(change_file, ValueError, (name, "download it again", *says))


def _with_code(refused: str, place: Callable[[dict, object], object]) -> Broken:
    def change(folder: Path) -> None:
        code = CODE[refused](folder / MARKER)
        rewrite(folder / FILES["unet"], lambda checkpoint: place(checkpoint, code))

    return Broken(change, ValueError, (FILES["unet"], f" {refused},", "refused", "only tensors"))


def _in_metadata_of_the_scale_factor(checkpoint: dict, code: object) -> None:
    checkpoint["scale_factor"] = with_metadata(checkpoint["scale_factor"], code)


def _in_metadata_of_a_weight(checkpoint: dict, code: object) -> None:
    weights = checkpoint["unet_state_dict"]
    weights[KEYS["unet"]] = with_metadata(weights[KEYS["unet"]], code)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 729800000\n"
DAMAGED_FILES = {
    "empty": lambda data: b"",
    "Git LFS pointer": lambda data: LFS_POINTER,
    "web page": lambda data: b"<!DOCTYPE html><html>Not found</html>",
    "bare pickle": lambda data: b"\x80\x02}q\x00.",
    **{
        f"cut at {cut}": lambda data, cut=cut: data[: cut if isinstance(cut, int) else int(cut * len(data))]
        for cut in (1, 4, 100, 5000, 0.1, 0.5, 0.9, 0.999)
    },
    "last byte cut": lambda data: data[:-1],
}

BROKEN = {
    **{
        f"missing key, {name}": _in_file(
            name, lambda checkpoint, key=key: operator.delitem(weights_of(checkpoint), key), "lacks 1 key(s)", key
        )
        for name, key in KEYS.items()
    },
    "missing time_emb_proj.weight, controlnet": _in_file(
        "controlnet",
        lambda checkpoint: operator.delitem(weights_of(checkpoint), "middle_block.resnet_1.time_emb_proj.weight"),
        "lacks 1 key(s)",
        "middle_block.resnet_1.time_emb_proj.weight",
    ),
    **{
        f"surplus key, {name}": _in_file(
            name,
            lambda checkpoint: weights_of(checkpoint).update({"surplus.weight": torch.zeros(2)}),
            "1 unexpected key(s)",
            "surplus.weight",
            "strict=False",
        )
        for name in FILES
    },
    **{
        f"wrong shape, {name}": _in_weight(name, lambda weight: weight[:-1].clone(), "has shape", "architecture")
        for name in FILES
    },
    "wrong shape that joins to the right one, vae": _in_file(
        "vae",
        lambda checkpoint: checkpoint.update(
            {"quant_conv_mu.conv.bias": torch.zeros(5), "quant_conv_log_sigma.conv.bias": torch.zeros(3)}
        ),
        "quant_conv_mu.conv.bias has shape (5,)",
        "(4,)",
    ),
    "wrong shape that does not join, vae": _in_file(
        "vae",
        lambda checkpoint: checkpoint.update({"quant_conv_log_sigma.conv.weight": torch.zeros(4, 4)}),
        "quant_conv_log_sigma.conv.weight has shape (4, 4)",
    ),
    **{
        f"{value!r} for a weight, {name}": _in_weight(name, lambda weight, value=value: value, "not a tensor")
        for name, value in (("vae", 1.0), ("unet", "text"), ("controlnet", [1, 2]), ("mask_unet", None))
    },
    "a list for the weights, unet": _in_file(
        "unet", lambda checkpoint: checkpoint.update({"unet_state_dict": []}), "'unet_state_dict'", "list"
    ),
    "keys that are not text, unet": _in_file(
        "unet", lambda checkpoint: weights_of(checkpoint).update({7: torch.zeros(2)}), "unexpected", "7"
    ),
    **{
        f"damaged, {name}": _with_bytes(FILES["unet"], change, "git lfs pull")
        for name, change in DAMAGED_FILES.items()
    },
    "damaged controlnet": _with_bytes(FILES["controlnet"], lambda data: data[:5000]),
    **{
        f"code beside the weights, {name}": _with_code(
            name, lambda checkpoint, code: checkpoint.update({"epoch": code})
        )
        for name in CODE
    },
    **{
        f"code in place of the file's content, {name}": _with_code(name, lambda checkpoint, code: code)
        for name in ("posix.system", "eval")
    },
    **{
        f"code in the metadata of the scale factor, {name}": _with_code(name, _in_metadata_of_the_scale_factor)
        for name in CODE
    },
    "code in the metadata of a weight": _with_code("posix.system", _in_metadata_of_a_weight),
    "text as numpy scalar": _in_file(
        "unet", lambda checkpoint: checkpoint.update({"epoch": np.str_("3")}), "numpy.dtype[U1],", "refused"
    ),
    "no unet_state_dict": _in_file(
        "unet", lambda checkpoint: {"scale_factor": 1.0, "weights": {}}, "no 'unet_state_dict'", "'weights'"
    ),
    "the ControlNet's file for the UNet's": Broken(
        lambda folder: (
            (folder / FILES["unet"]).unlink(),
            os.link(folder / FILES["controlnet"], folder / FILES["unet"]),
        ),
        ValueError,
        (FILES["unet"], "no 'unet_state_dict'", "'controlnet_state_dict'"),
    ),
    "no controlnet_state_dict": _in_file(
        "controlnet", lambda checkpoint: checkpoint["controlnet_state_dict"], "no 'controlnet_state_dict'"
    ),
    "an empty dictionary": _in_file("controlnet", lambda checkpoint: {}, "no 'controlnet_state_dict'"),
    "no scale_factor": _in_file(
        "unet", lambda checkpoint: operator.delitem(checkpoint, "scale_factor"), "no 'scale_factor'", "released file"
    ),
    **{
        f"scale factor {value!r}": _in_file(
            "unet", lambda checkpoint, value=value: checkpoint.update({"scale_factor": value}), "'scale_factor'", says
        )
        for value, says in (
            (0.0, "0.0"),
            (-1.0, "-1.0"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            ("1.3", "'1.3'"),
            (torch.ones(2), "[1.0, 1.0]"),
        )
    },
    "a list in place of a dictionary": _in_file("unet", lambda checkpoint: [1, 2], "holds a list"),
    "a tensor in place of a dictionary": _in_file("vae", lambda checkpoint: torch.zeros(2), "holds a Tensor"),
    **{
        f"no file, {name}": Broken(
            lambda folder, name=name: (folder / FILES[name]).unlink(),
            FileNotFoundError,
            (FILES[name], f"the {name} of rflow-ct", "download it"),
        )
        for name in ("vae", "unet")
    },
    **{
        f"configuration, {name}": _with_bytes(CONFIG, lambda data, text=text: text, "not JSON")
        for name, text in (
            ("cut", b'{"spatial_dims": 3, "im'),
            ("empty", b""),
            ("LFS", LFS_POINTER),
            ("binary", b"\xff\x00"),
        )
    },
}


def _in_config(section: str | None, field: str, value: object, *says: str) -> Broken:
    def change(config: dict) -> None:
        (config if section is None else config[section])[field] = value

    return Broken(lambda folder: rewrite_config(folder, change), ValueError, (CONFIG, field, *says))


BROKEN |= {
    "configuration, unknown field": _in_config("diffusion_unet_def", "num_experts", 8, "not known"),
    "configuration, nonlocal attention in the encoder": _in_config(
        "autoencoder_def", "with_encoder_nonlocal_attn", True, "not supported, only False"
    ),
    "configuration, attention in the VAE": _in_config(
        "mask_generation_autoencoder_def", "attention_levels", [False, False, True], "not supported"
    ),
    "configuration, predicts v": _in_config(
        "mask_generation_noise_scheduler", "prediction_type", "v_prediction", "not supported, only epsilon"
    ),
    "configuration, contradictory region flags": _in_config(
        "diffusion_unet_def", "include_bottom_region_index_input", True, "contradicts", "use_region_index"
    ),
    "configuration, unknown reference": _in_config(
        "controlnet_def", "in_channels", "@image_in_channels", "'@image_in_channels'", "does not have"
    ),
    "configuration, a list": Broken(
        lambda folder: (
            (folder / CONFIG).unlink(),
            (folder / CONFIG).write_text("[]"),
        ),
        ValueError,
        (CONFIG, "list"),
    ),
}
