"""Bad input: one line that names the value, the rule and the remedy, before any network runs."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DEISMultistepScheduler, FlowMatchEulerDiscreteScheduler

from maisi_diffusers import MaisiMaskDatabase
from maisi_diffusers.pipelines.input_rules import CT_RULES
from tests.mask_databases import make_database
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded

GRID = {"output_size": SIZE, "spacing": SPACING}
IMAGE_ONLY = {"image_only": True, **GRID}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    pipes = {
        "rflow": make_pipeline("rflow-ct"),
        "ddpm": make_pipeline("ddpm-ct"),
        "published rules": make_pipeline("rflow-ct"),
        "no masks": make_pipeline("rflow-ct", with_mask_networks=False),
        "no controlnet": make_pipeline("rflow-ct", with_mask_networks=False),
        "wrong scheduler": make_pipeline("rflow-ct"),
        "wrong flow": make_pipeline("ddpm-ct"),
        "untested solver": make_pipeline("rflow-ct"),
        "contrast": make_pipeline("rflow-ct", with_mask_networks=False),
        "database": make_pipeline("rflow-ct"),
        "damaged database": make_pipeline("ddpm-ct"),
    }
    for name in ("database", "damaged database"):
        folder = make_database(tmp_path_factory.mktemp("database"), zipped=True)
        pipes[name].mask_database = MaisiMaskDatabase(folder)
    (folder / "masks.zip").write_bytes((folder / "masks.zip").read_bytes()[:-100])
    pipes["published rules"].register_to_config(input_rules=CT_RULES)
    pipes["no controlnet"].controlnet = None
    pipes["contrast"].register_to_config(modalities=["ct", "ct_contrast"])
    pipes["untested solver"].scheduler = DEISMultistepScheduler.from_config(pipes["rflow"].scheduler.config)
    pipes["wrong scheduler"].scheduler = DDPMScheduler.from_config(pipes["rflow"].scheduler.config)
    pipes["wrong flow"].scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipes["ddpm"].scheduler.config)
    return pipes


@pytest.fixture(autouse=True)
def no_network_runs(pipes, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a network ran")

    for pipe in pipes.values():
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                monkeypatch.setattr(component, "forward", fail)
                for name in ("encode", "decode", "embed_condition"):
                    if hasattr(component, name):
                        monkeypatch.setattr(component, name, fail)


CASES = {
    # grid
    "size not divisible": ("rflow", IMAGE_ONLY | {"output_size": (24, 20, 32)}, "(24, 20, 32)", "divide by 8"),
    "size of two axes": ("rflow", IMAGE_ONLY | {"output_size": (24, 16)}, "(24, 16)", "three positive whole"),
    "size a number": ("rflow", IMAGE_ONLY | {"output_size": 64}, "64", "three positive whole"),
    "size negative": ("rflow", IMAGE_ONLY | {"output_size": (24, -16, 32)}, "-16", "three positive whole"),
    "size a fraction": ("rflow", IMAGE_ONLY | {"output_size": (24, 16.5, 32)}, "16.5", "three positive whole"),
    "spacing zero": ("rflow", IMAGE_ONLY | {"spacing": (1, 1, 0)}, "(1, 1, 0)", "three positive numbers of mm"),
    "spacing not finite": ("rflow", IMAGE_ONLY | {"spacing": (1, 1, float("nan"))}, "nan", "three positive numbers"),
    "spacing out of range": (
        "published rules",
        {"image_only": True, "output_size": (512, 512, 128), "spacing": (4, 4, 1)},
        "(4, 4, 1)",
        "0.5 to 3.0 mm along X",
    ),
    "size not trained": ("published rules", {"image_only": True, "output_size": (64, 64, 64)}, "64", "256x256x128"),
    "field of view": (
        "published rules",
        {"image_only": True, "output_size": (256, 256, 128), "spacing": (0.5, 0.5, 1)},
        "128 x 128 mm",
        "256 mm",
    ),
    # names
    "region not in a list": ("rflow", IMAGE_ONLY | {"body_region": "chest"}, "'chest'", "list of names"),
    "sizes not in a list": ("rflow", {"controllable_anatomy_size": 5, **GRID}, "5", "('liver', 0.5)"),
    "vector not a list": ("rflow", {"anatomy_size": 0.5, **GRID}, "0.5", "vector of 10"),
    "unknown region": ("rflow", IMAGE_ONLY | {"body_region": ["thigh"]}, "thigh", "chest"),
    "unknown organ": ("rflow", {"anatomy_list": ["livr"], **GRID}, "livr", "liver"),
    "unknown modality": ("rflow", IMAGE_ONLY | {"modality": "pet"}, "pet", "ct"),
    "unknown modality code": ("rflow", IMAGE_ONLY | {"modality": 300}, "300", "127"),
    "unknown output type": ("rflow", IMAGE_ONLY | {"output_type": "pil"}, "pil", "nifti"),
    "unknown vocabulary": ("rflow", {"mask": "good", "mask_vocabulary": "nnunet"}, "nnunet", "totalsegmentator"),
    "vocabulary of no mask": (
        "rflow",
        IMAGE_ONLY | {"mask_vocabulary": "totalsegmentator"},
        "'totalsegmentator'",
        "none was given",
    ),
    "unknown controllable": ("rflow", {"controllable_anatomy_size": [("spleen", 0.5)], **GRID}, "spleen", "liver"),
    # sizes of anatomy
    "anatomy size": ("rflow", {"controllable_anatomy_size": [("liver", 1.5)], **GRID}, "1.5", "0 to 1"),
    "anatomy twice": (
        "rflow",
        {"controllable_anatomy_size": [("liver", 0.5), ("liver", 0.2)], **GRID},
        "liver",
        "give it once",
    ),
    "two tumors": (
        "rflow",
        {"controllable_anatomy_size": [("lung tumor", 0.5), ("hepatic tumor", 0.2)], **GRID},
        "hepatic tumor",
        "at most one",
    ),
    "not pairs": ("rflow", {"controllable_anatomy_size": ["liver"], **GRID}, "'liver'", "('liver', 0.5)"),
    "size not a number": ("rflow", {"controllable_anatomy_size": [("liver", "big")], **GRID}, "big", "('liver', 0.5)"),
    "vector of nine": ("rflow", {"anatomy_size": [0.5] * 9, **GRID}, "9 entries", "give 10"),
    # the label map's file
    "no file": ("rflow", {"mask": "missing.nii.gz"}, "missing.nii.gz", "path"),
    "empty file": ("rflow", {"mask": "empty"}, "0 bytes", "again"),
    "not a nifti": ("rflow", {"mask": "text"}, "text.nii.gz", "export"),
    "truncated": ("rflow", {"mask": "truncated"}, "truncated.nii.gz", "again"),
    "an array": ("rflow", {"mask": np.zeros((8, 8, 8))}, "ndarray", "nib.Nifti1Image(array, affine)"),
    "label over 255": ("rflow", {"mask": "over 255"}, "300", "0..255"),
    "negative label": ("rflow", {"mask": "negative"}, "-3", "0..255"),
    "label not MAISI's": ("rflow", {"mask": "gap"}, "150", "1 to 132"),
    "label not TotalSegmentator's": (
        "rflow",
        {"mask": "good", "mask_vocabulary": "totalsegmentator"},
        "200",
        "117",
    ),
    "float labels": ("rflow", {"mask": "float"}, "floating-point", "uint8"),
    "4D": ("rflow", {"mask": "4D"}, "(24, 16, 32, 2)", "one volume"),
    "no label": ("rflow", {"mask": "background"}, "no label", "check"),
    "body image missing": ("rflow", {"mask": "no body", "body_image": "missing.nii.gz"}, "missing.nii.gz", "path"),
    "region unknown": ("ddpm", {"mask": "only heart"}, "[115, 200]", "body_region"),
    # contradictions
    "mask and sizes": (
        "rflow",
        {"mask": "good", "controllable_anatomy_size": [("liver", 0.5)]},
        "controllable_anatomy_size",
        "leave one out",
    ),
    "mask and vector": ("rflow", {"mask": "good", "anatomy_size": [0.5] * 5 + [-1] * 5}, "anatomy_size", "leave one"),
    "mask and anatomy list": ("rflow", {"mask": "good", "anatomy_list": ["liver"]}, "anatomy_list", "leave one out"),
    "sizes twice": (
        "rflow",
        {"controllable_anatomy_size": [("liver", 0.5)], "anatomy_size": [0.5] * 5 + [-1] * 5, **GRID},
        "anatomy_size",
        "exactly one",
    ),
    "image only and mask": ("rflow", IMAGE_ONLY | {"mask": "good"}, "mask", "leave one out"),
    "image only and sizes": (
        "rflow",
        IMAGE_ONLY | {"controllable_anatomy_size": [("liver", 0.5)]},
        "controllable_anatomy_size",
        "leave one out",
    ),
    "image only without region": ("ddpm", IMAGE_ONLY, "body region", "body_region="),
    "body image without mask": ("rflow", IMAGE_ONLY | {"body_image": "good"}, "body_image", "both or neither"),
    "restore without mask": ("rflow", IMAGE_ONLY | {"restore_grid": True}, "restore_grid", "mask="),
    "restore as array": ("rflow", {"mask": "good", "restore_grid": True, "output_type": "np"}, "'np'", "'nifti'"),
    "nothing to follow": ("rflow", GRID, "no label map", "image_only=True"),
    "only an anatomy list": ("rflow", {"anatomy_list": ["liver"], **GRID}, "no label map", "mask="),
    "only a region": ("rflow", {"body_region": ["chest"], **GRID}, "no mask database", "pipe.mask_database"),
    # the mask database
    "nothing to look up": ("database", GRID, "no label map", "body_region= or anatomy_list="),
    "no such label map": ("database", {"anatomy_list": ["prostate"], **GRID}, "prostate", "change anatomy_list"),
    "tumor elsewhere": (
        "database",
        {"anatomy_list": ["hepatic tumor"], "body_region": ["chest"], **GRID},
        "with hepatic tumor shows chest",
        "abdomen (1), head (1); change body_region",
    ),
    "tumor besides": ("database", {"body_region": ["head"], **GRID}, "hepatic tumor (1)", "add it to anatomy_list"),
    "no such grid": (
        "database",
        {"body_region": ["chest"], "output_size": (24, 16, 160), "spacing": (2, 2, 3)},
        "large enough for output_size=(24, 16, 160)",
        "output_size=(24, 16, 32) with spacing=(2, 2, 3) (2)",
    ),
    "default grid": ("database", {"body_region": ["chest"]}, "(512, 512, 512)", "give one of these"),
    "label number": ("database", {"anatomy_list": [150], **GRID}, "150", "1..132"),
    "damaged database": ("damaged database", {"body_region": ["chest"], **GRID}, "masks.zip", "download it again"),
    "no mask networks": (
        "no masks",
        {"controllable_anatomy_size": [("liver", 0.5)], **GRID},
        "mask networks",
        "mask=",
    ),
    "no controlnet": ("no controlnet", {"mask": "good"}, "no ControlNet", "image_only=True"),
    # sampling
    "no images": ("rflow", IMAGE_ONLY | {"num_images": 0}, "num_images=0", "at least 1"),
    "no steps": ("rflow", IMAGE_ONLY | {"num_inference_steps": 0}, "num_inference_steps=0", "1 to 1000"),
    "too many steps": ("rflow", IMAGE_ONLY | {"num_inference_steps": 1001}, "1001", "1 to 1000"),
    "guidance not a number": ("rflow", IMAGE_ONLY | {"guidance_scale": float("nan")}, "nan", "0 (off)"),
    "conditioning scale": (
        "rflow",
        IMAGE_ONLY | {"controlnet_conditioning_scale": float("inf")},
        "inf",
        "give a number",
    ),
    "conditioning of nothing": (
        "rflow",
        IMAGE_ONLY | {"controlnet_conditioning_scale": 0.5},
        "has none",
        "leave one out",
    ),
    "MR from a CT model": (
        "ddpm",
        IMAGE_ONLY | {"body_region": ["chest"], "modality": "t1"},
        "code 9",
        "leave modality out",
    ),
    "MR from a model that says what it makes": (
        "contrast",
        IMAGE_ONLY | {"modality": "t1"},
        "code 9",
        "use one of ct, ct_contrast",
    ),
    "a seed for a generator": ("rflow", IMAGE_ONLY | {"generator": 0}, "generator=0", "manual_seed"),
    "an array of noise": ("rflow", IMAGE_ONLY | {"latents": np.zeros((1, 4, 6, 4, 8))}, "ndarray", "tensor"),
    "solver that fails": ("untested solver", IMAGE_ONLY, "DEISMultistepScheduler", "UniPC"),
    "guidance": ("rflow", IMAGE_ONLY | {"guidance_scale": -1.0}, "-1.0", "0 (off)"),
    "generators": (
        "rflow",
        IMAGE_ONLY | {"num_images": 3, "generator": [seeded()] * 2},
        "2 generators",
        "one an image",
    ),
    "latents": ("rflow", IMAGE_ONLY | {"latents": torch.zeros(1, 4, 2, 2, 2)}, "(1, 4, 2, 2, 2)", "(1, 4, 6, 4, 8)"),
    "callback inputs": ("rflow", IMAGE_ONLY | {"callback_on_step_end_tensor_inputs": ["noise"]}, "noise", "latents"),
    "scheduler of the other kind": ("wrong scheduler", IMAGE_ONLY, "DDPMScheduler", "from_config"),
    "flow for noise": (
        "wrong flow",
        IMAGE_ONLY | {"body_region": ["chest"]},
        "FlowMatchEulerDiscreteScheduler",
        "DDPMScheduler",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Label maps by name: good and bad ones."""
    folder = tmp_path_factory.mktemp("masks")
    good = make_label_map()
    labels, affine = np.asarray(good.dataobj), good.affine

    def save(name, array):
        path = folder / f"{name}.nii.gz"
        nib.Nifti1Image(array, affine).to_filename(path)
        return path

    paths = {
        "good": save("good", labels),
        "no body": save("no body", np.where(labels == 200, 0, labels).astype(np.uint8)),
        "over 255": save("over 255", np.where(labels == 200, np.int16(300), labels)),
        "negative": save("negative", np.where(labels == 0, np.int16(-3), labels)),
        "gap": save("gap", np.where(labels == 1, 150, labels).astype(np.uint8)),
        "float": save("float", labels.astype(np.float32) + 0.5),
        "4D": save("4D", np.stack([labels, labels], axis=-1)),
        "background": save("background", np.zeros_like(labels)),
        "only heart": save("only heart", np.where(labels == 1, 115, np.where(labels, 200, 0)).astype(np.uint8)),
    }
    paths["empty"] = folder / "empty.nii.gz"
    paths["empty"].touch()
    paths["text"] = folder / "text.nii.gz"
    paths["text"].write_bytes(gzip.compress(b"not a volume"))
    paths["truncated"] = folder / "truncated.nii.gz"
    paths["truncated"].write_bytes(paths["good"].read_bytes()[:-200])
    return paths


@pytest.mark.parametrize("case", CASES)
def test_bad_input(pipes, files, case):
    pipe, arguments, value, remedy = CASES[case]
    arguments = {key: files.get(arg, arg) if isinstance(arg, str) else arg for key, arg in arguments.items()}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        pipes[pipe](**arguments)
    message = str(error.value)
    assert "\n" not in message
    assert value in message and remedy in message, message
