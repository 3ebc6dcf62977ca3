"""What is said of a model while it is trained: pictures, HU by organ, the loss on held-out cases."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from maisi_diffusers import MaisiControlNetModel, MaisiCTPipeline
from maisi_diffusers.anatomy import new_vocabulary
from maisi_diffusers.training.data_list import read_data_list, split_fold
from maisi_diffusers.training.dataset import LatentDataset
from maisi_diffusers.training.objectives import ControlNetObjective
from maisi_diffusers.training.trackers import read_log
from maisi_diffusers.training.validation import (
    log_pictures,
    mean_loss,
    median_hu,
    sample_cases,
    sample_masks,
    sample_unconditioned,
)
from tests.scripts.training_data import NEW_CLASS, NEW_LABEL, on_latents, run
from tests.tiny import SPACING, make_pipeline

# The weights as good as stay, for images to compare.
OPTIONS = ["--learning_rate", 1e-30, "--max_train_steps", 4, "--validation_steps", 2]
OPTIONS += ["--validation_num_inference_steps", 2]
ORGANS = {"liver", "left lung upper lobe", "left femur", NEW_CLASS}


@pytest.fixture(scope="module")
def held_out(latents):
    return split_fold(read_data_list(latents / "list.json").cases, 0)[1]


@pytest.fixture(scope="module")
def validated(train_controlnet, latents, tmp_path_factory):
    output = tmp_path_factory.mktemp("validated")
    run(train_controlnet, *on_latents(latents, output, *OPTIONS, "--use_ema"))
    return output


@pytest.fixture(scope="module")
def pipe(latents):
    pipe = MaisiCTPipeline.from_pretrained(latents / "base")
    pipe.controlnet.add_classes({NEW_CLASS: NEW_LABEL}, {NEW_CLASS: ["liver"]})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files(validated):
    names = {path.relative_to(validated / "validation").as_posix() for path in (validated / "validation").rglob("*.*")}
    files = ("0-case-0_label.png", "1-case-4_label.png", "median_hu.json")
    assert names == {f"step-{step}/{name}" for step in (2, 4) for name in files}
    for picture in validated.rglob("*.png"):
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert min(pixels.shape[:2]) > 300 and pixels.std() > 10


def test_hu_by_organ(validated):
    medians = json.loads((validated / "validation" / "step-2" / "median_hu.json").read_text())
    assert medians.keys() == {"0-case-0_label", "1-case-4_label"}
    for organs in medians.values():
        assert organs.keys() == ORGANS
        assert all(-1000 <= value <= 1000 for value in organs.values()) and len(set(organs.values())) > 1


def test_logged(validated):
    log = read_log(validated / "log.jsonl")
    assert [(line["step"], "validation_loss" in line) for line in log] == [
        *((1, False), (2, False), (2, True), (3, False), (4, False), (4, True))
    ]
    medians = json.loads((validated / "validation" / "step-2" / "median_hu.json").read_text())
    expected = {f"hu/{case}/{organ}": value for case, organs in medians.items() for organ, value in organs.items()}
    assert log[2] == {"step": 2, "validation_loss": log[2]["validation_loss"], **expected}


def test_same_weights_same_results(validated):
    """Noise and timesteps are the same at every validation."""
    first, second = (line for line in read_log(validated / "log.jsonl") if "validation_loss" in line)
    assert first | {"step": 4} == second
    for path in (validated / "validation" / "step-2").iterdir():
        assert path.read_bytes() == (validated / "validation" / "step-4" / path.name).read_bytes()


def make_objective(pipe, controlnet):
    factor, weights = pipe.vae.config.scaling_factor, {"weighted_labels": (NEW_LABEL,), "weighted_loss": 100.0}
    return ControlNetObjective(
        controlnet, controlnet.config, pipe.unet, pipe.unet.config, pipe.scheduler, factor, **weights
    )


def test_validation_loss(validated, pipe, held_out):
    """The loss of the held-out cases, each with draws of its own."""
    logged = next(line for line in read_log(validated / "log.jsonl") if "validation_loss" in line)
    dataset = LatentDataset(held_out, pipe.scheduler, 0, with_labels=True)
    objective = make_objective(pipe, pipe.controlnet)
    assert mean_loss(objective, dataset, torch.device("cpu")) == pytest.approx(logged["validation_loss"], rel=1e-5)
    with torch.no_grad():
        single = [objective({name: value[None] for name, value in dataset[i].items()})["loss"].item() for i in (0, 1)]
    assert np.mean(single) == pytest.approx(logged["validation_loss"], rel=1e-5) and single[0] != single[1]


def test_averages_are_validated(train_controlnet, latents, pipe, held_out, tmp_path):
    """Those that are saved."""
    options = [*OPTIONS, "--learning_rate", 1e-2, "--use_ema", "--num_validation_images", 1]
    run(train_controlnet, *on_latents(latents, tmp_path, *options))
    logged = read_log(tmp_path / "log.jsonl")[-1]["validation_loss"]
    dataset = LatentDataset(held_out, pipe.scheduler, 0, with_labels=True)
    saved = MaisiControlNetModel.from_pretrained(tmp_path)
    assert mean_loss(make_objective(pipe, saved), dataset, torch.device("cpu")) == pytest.approx(logged, rel=1e-5)


def test_validation_changes_nothing(validated, train_controlnet, latents, tmp_path):
    """Neither weights nor draws of the steps after it."""
    run(train_controlnet, *on_latents(latents, tmp_path, *OPTIONS[:4], "--use_ema"))
    assert read_log(tmp_path / "log.jsonl") == [
        line for line in read_log(validated / "log.jsonl") if "validation_loss" not in line
    ]
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (validated / name).read_bytes()


def test_number_of_images(train_controlnet, latents, tmp_path):
    run(train_controlnet, *on_latents(latents, tmp_path, *OPTIONS, "--num_validation_images", 1))
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert pictures == {f"validation/step-{step}/0-case-0_label.png" for step in (2, 4)}


def test_single_fold(train_controlnet, latents, tmp_path):
    """All cases are for training, and none is left to validate with."""
    content = json.loads((latents / "list.json").read_text())
    for entry in content["training"]:
        entry["fold"] = 3
    (tmp_path / "list.json").write_text(json.dumps(content))
    data = ["--data_list", tmp_path / "list.json", "--data_root", latents]
    run(train_controlnet, *on_latents(latents, tmp_path / "output", *OPTIONS, *data))
    assert not (tmp_path / "output" / "validation").exists()
    assert "8 cases" in (tmp_path / "output" / "README.md").read_text()


def test_unconditioned(train_unet, latents, tmp_path):
    run(train_unet, *on_latents(latents, tmp_path, *OPTIONS))
    for step in (2, 4):
        names = {path.name for path in (tmp_path / "validation" / f"step-{step}").iterdir()}
        assert names == {"0-case-0_emb.png", "1-case-4_emb.png"}
    losses = [line["validation_loss"] for line in read_log(tmp_path / "log.jsonl") if "validation_loss" in line]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_files_of_one_name(pipe, held_out, tmp_path):
    """As in the published layout, where every case has a folder; sizes need not be in the list."""
    cases = []
    for case in held_out:
        folder = tmp_path / case.label.stem
        folder.mkdir()
        image, label = (shutil.copy(path, folder / path.name[7:]) for path in (case.image, case.label))
        cases.append(replace(case, image=image, label=label))
    medians = sample_cases(pipe, cases, tmp_path / "with", 1, 0)
    assert list(medians) == ["0-label", "1-label"] and medians["0-label"] != medians["1-label"]
    sample_unconditioned(pipe, [replace(case, dim=None) for case in cases], tmp_path / "without", 1, 0)
    assert len(list((tmp_path / "with").glob("*.png"))) == len(list((tmp_path / "without").glob("*.png"))) == 2


def test_median_hu():
    labels = np.zeros((4, 4, 4), dtype=np.uint8)
    labels[:2], labels[2], labels[3, 0] = 200, 1, NEW_LABEL
    hu = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    images = (nib.Nifti1Image(array, np.diag([*SPACING, 1.0])) for array in (hu, labels))
    medians = median_hu(*images, new_vocabulary({NEW_CLASS: NEW_LABEL}))
    assert medians == {"liver": 39.5, NEW_CLASS: 49.5}


def test_pictures_of_a_model_that_takes_regions(held_out, tmp_path):
    pipe = make_pipeline("ddpm-ct", with_mask_networks=False)
    top, bottom = (0, 1, 0, 0), (0, 0, 0, 1)
    given = []
    pipe.prepare_conditions = lambda *args, **kwargs: given.append(args) or type(pipe).prepare_conditions(pipe, *args)
    case = replace(held_out[0], top_region_index=top, bottom_region_index=bottom)
    sample_unconditioned(pipe, [case], tmp_path, 1, 0)
    assert given[0][3] == ["chest", "pelvis"] and given[0][1] == SPACING
    assert (tmp_path / "0-case-0_emb.png").is_file()


def test_label_maps_of_the_sizes_of_cases(held_out, tmp_path):
    """With one tumor, the largest, since the pipeline takes one at most."""
    organs = [0.2, -1.0, 0.5, 0.9, 0.0]
    sizes = ([*organs, -1.0, 0.3, 0.4, -1.0, 0.1], [*organs, -1.0, -1.0, -1.0, -1.0, -1.0])
    given = []

    def pipe(anatomy_size, num_inference_steps, generator):
        given.append((anatomy_size, num_inference_steps, generator.initial_seed()))
        return SimpleNamespace(masks=[nib.Nifti1Image(np.full((8, 8, 8), 200, np.uint8), np.eye(4))])

    sample_masks(pipe, [replace(held_out[0], organ_size=tuple(one)) for one in sizes], tmp_path, 3, 7)
    assert given == [([*organs, -1.0, -1.0, 0.4, -1.0, -1.0], 3, 7), (list(sizes[1]), 3, 7)]
    assert {path.name for path in tmp_path.iterdir()} == {"0-case-0_emb.png", "1-case-0_emb.png"}


def test_trackers_get_pictures(tmp_path):
    for i, name in enumerate(("b", "a")):
        Image.new("RGB", (4, 3), (i, 2, 3)).save(tmp_path / f"{name}.png")
    (tmp_path / "median_hu.json").write_text("{}")

    class Tracker:
        name = "tensorboard"

        def log_images(self, values, step):
            self.values, self.step = values, step

    tracker, other = Tracker(), SimpleNamespace(name="json_lines")
    log_pictures(SimpleNamespace(trackers=[other, tracker]), tmp_path, 7)
    assert tracker.step == 7 and list(tracker.values) == ["validation/a", "validation/b"]
    picture = tracker.values["validation/a"]
    assert picture.shape == (1, 3, 4, 3) and picture.dtype == np.uint8 and (picture == (1, 2, 3)).all()
