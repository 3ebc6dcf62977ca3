"""Tiny data sets to train on, and the training scripts as functions."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState

from maisi_diffusers import MaisiMaskPipeline, MaisiRFlowScheduler
from maisi_diffusers.training.arguments import parse_args
from maisi_diffusers.training.data_list import Case, DataList, write_data_list
from maisi_diffusers.training.run import run_script
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline

SCRIPTS = Path(__file__).parents[2] / "scripts"
NEW_CLASS, NEW_LABEL = "kidney tumor", 129
ORGANS = ["left kidney", "liver"]
RATIO = 4


def make_latents(folder: Path, version: str = "rflow-ct") -> Path:
    """
    Write eight random latents with label maps that have a new class, `list.json`, and a model for them, `base`.

    They are of four folds: with fold 0 held out, numbers 0 and 4 are for validation and six for training.
    """
    make_pipeline(version, with_mask_networks=False).save_pretrained(folder / "base")
    draw = np.random.default_rng(0)
    cases = []
    for i in range(8):
        case = Case(
            folder / f"case-{i}_emb.nii.gz",
            folder / f"case-{i}_label.nii.gz",
            SIZE,
            SPACING,
            top_region_index=(0, 0, 1, 0),
            bottom_region_index=(0, 0, 0, 1),
            fold=i % 4,
        )
        label_map = make_label_map()
        labels = np.asarray(label_map.dataobj)
        labels[labels == 26] = NEW_LABEL
        labels[7 : 8 + i, 5:8, 12:16] = NEW_LABEL  # of another size in every case
        nib.save(label_map, case.label)
        latent = draw.normal(size=(*(n // RATIO for n in SIZE), 4)).astype(np.float32)
        save_latent(case.image, latent)
        cases.append(case)
    write_data_list(folder / "list.json", DataList(cases, {NEW_CLASS: NEW_LABEL}, {NEW_CLASS: ORGANS}))
    return folder


def save_latent(path: Path, latent: np.ndarray) -> None:
    """Write a latent (X, Y, Z, C) with the field of view of its label map."""
    affine = np.diag([*SPACING, 1.0]) @ nib.affines.from_matvec(np.eye(3) * RATIO, [(RATIO - 1) / 2] * 3)
    nib.save(nib.Nifti1Image(latent, affine), path)


def make_volumes(folder: Path) -> Path:
    """Write six CTs of 32 x 32 x 28 voxels in three folds, `list.json`, and a VAE for them, `vae`."""
    make_pipeline(with_mask_networks=False).vae.save_pretrained(folder / "vae")
    draw = np.random.default_rng(0)
    cases = []
    for i in range(6):
        case = Case(folder / f"case-{i}.nii.gz", fold=i % 3)
        coarse = draw.integers(-900, 900, (8, 8, 7)).astype(np.int16)
        nib.save(nib.Nifti1Image(coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2), np.eye(4)), case.image)
        cases.append(case)
    write_data_list(folder / "list.json", DataList(cases))
    return folder


def make_label_maps(folder: Path) -> Path:
    """Write four label maps of 24 x 16 x 32 voxels in two folds, `list.json`, and a mask VAE for them, `vae`."""
    make_pipeline().mask_vae.save_pretrained(folder / "vae")
    cases = []
    for i in range(4):
        case = Case(folder / f"case-{i}.nii.gz", folder / f"case-{i}_label.nii.gz", fold=i % 2)
        label_map = make_label_map()
        np.asarray(label_map.dataobj)[4:7, 3:9, 20 : 24 + i] = 5
        nib.save(label_map, case.label)
        cases.append(case)
    write_data_list(folder / "list.json", DataList(cases))
    return folder


def make_mask_latents(folder: Path) -> Path:
    """
    Write six random latents of label maps with anatomy sizes in three folds, `list.json`, and a model for them,
    `base`, which is of rectified flow.
    """
    pipe = make_pipeline()
    MaisiMaskPipeline(
        pipe.mask_vae, pipe.mask_unet, MaisiRFlowScheduler(), mask_num_inference_steps=2
    ).save_pretrained(folder / "base")
    draw = np.random.default_rng(0)
    cases = []
    for i in range(6):
        sizes = [0.1 * i, 0.5, -1.0, *draw.random(2).round(2), -1.0, -1.0, 0.3, 0.2, -1.0]  # two tumors
        case = Case(folder / f"case-{i}_emb.nii.gz", dim=SIZE, spacing=SPACING, fold=i % 3, organ_size=tuple(sizes))
        save_latent(case.image, draw.normal(size=(*(n // RATIO for n in SIZE), 4)).astype(np.float32))
        cases.append(case)
    write_data_list(folder / "list.json", DataList(cases))
    return folder


def load_script(name: str) -> ModuleType:
    """`scripts/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, *arguments: object) -> None:
    """Run a training script in this process, as if it were the first thing that uses accelerate."""
    try:
        run_script(script.train, parse_args(script.make_parser(), [str(argument) for argument in arguments]))
    finally:
        reset_accelerate()


def interrupt(script: ModuleType, updates: int, *arguments: object) -> None:
    """Run a training script until it has updated a network so often, and let the next update fail."""
    update, calls = script.Trainer.update, itertools.count()

    def stop(*args: object) -> None:
        if next(calls) == updates:
            raise KeyboardInterrupt
        update(*args)

    with mock.patch.object(script.Trainer, "update", stop), pytest.raises(KeyboardInterrupt):
        run(script, *arguments)


def reset_accelerate() -> None:
    """Forget what accelerate knows of this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def error_of(script: ModuleType, *arguments: object) -> str:
    """The line that a training script ends in."""
    with pytest.raises(SystemExit) as exit_:
        run(script, *arguments)
    message = exit_.value.code  # a text ends a process with exit code 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def on_latents(data: Path, output: Path, *options: object) -> list[object]:
    """Arguments of a training on what [`make_latents`] wrote."""
    base = ["--pretrained_model_name_or_path", data / "base", "--data_list", data / "list.json"]
    return [*base, "--output_dir", output, "--learning_rate", 1e-3, *options]


def on_volumes(data: Path, output: Path, *options: object) -> list[object]:
    """Arguments of a training on what [`make_volumes`] wrote."""
    return ["--data_list", data / "list.json", "--output_dir", output, "--perceptual_weight", 0, *options]
