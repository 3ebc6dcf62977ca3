"""`maisi-ct generate`: what it leaves, the same each time, and what it says instead of leaving anything."""

import errno
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.cli import generation
from tests.hub_server import HubServer, process_on
from tests.mask_databases import MASKS, make_mask
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded

from .running import error_of, run, run_json

ENDINGS = ("_ct.nii.gz", "_labels.nii.gz", ".png", ".json")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(*stems: str) -> set[str]:
    """The files of these images."""
    return {stem + ending for stem in stems for ending in ENDINGS}


@pytest.fixture
def base(model, mask, tmp_path):
    """Options of a run that writes to `out`."""
    return ["--model", model, "--mask", mask, "--device", "cpu", "--output", tmp_path / "out"]


def test_files(base, model, mask, tmp_path):
    result = run("generate", *base, "--seed", 3)
    out = tmp_path / "out"
    assert result.exit_code == 0 and files_of(out).keys() == names("tiny_seed3")
    path = out / "tiny_seed3_ct.nii.gz"
    assert result.stdout.startswith(f"{path}: 24 x 16 x 32 voxels of 2 x 2 x 3 mm, 5 labels, ")
    assert result.stdout.count("\n") == 1

    image, labels = nib.load(path), nib.load(out / "tiny_seed3_labels.nii.gz")
    assert (image.get_data_dtype(), labels.get_data_dtype()) == (np.int16, np.uint8)
    assert image.header["descrip"].item() == labels.header["descrip"].item() == b"synthetic: maisi-diffusers"
    # The pipeline is what makes it.
    expected = MaisiCTPipeline.from_pretrained(model)(mask=mask, generator=seeded(3))
    assert np.array_equal(image.dataobj, expected.images[0].dataobj)
    assert np.array_equal(labels.dataobj, make_label_map().dataobj)
    assert np.allclose(image.affine, labels.affine) and np.allclose(image.affine, make_label_map().affine)
    assert (out / "tiny_seed3.png").read_bytes().startswith(b"\x89PNG")


def test_record(base, model, mask, tmp_path):
    run("generate", *base, "--seed", 3, "--guidance-scale", 1.5, "--spacing", 2, 2, 3)
    record = json.loads((tmp_path / "out" / "tiny_seed3.json").read_text())
    assert record["format"] == 1 and record["synthetic"] is True and record["seed"] == 3
    assert record["model"] == {"name": "tiny", "source": str(model), "revision": None}
    assert record["request"] == {"mask": str(mask), "spacing": [2.0, 2.0, 3.0], "guidance_scale": 1.5}
    arguments = record["arguments"]
    assert arguments["output_size"] == list(SIZE) and arguments["spacing"] == list(SPACING)
    assert (arguments["num_inference_steps"], arguments["modality"]) == (2, "ct")
    assert (arguments["guidance_scale"], arguments["controlnet_conditioning_scale"]) == (1.5, 1.0)
    assert (record["device"], record["dtype"], record["scheduler"]) == ("cpu", "float32", "MaisiRFlowScheduler")
    assert {"maisi-diffusers", "torch", "diffusers", "python", "platform"} == record["versions"].keys()
    assert record["labels"].keys() == {"liver", "hepatic tumor", "left lung upper lobe", "left femur", "body"}
    voxels = np.count_nonzero(np.asarray(make_label_map().dataobj) == 26)
    assert record["labels"]["hepatic tumor"] == {"index": 26, "voxels": voxels, "ml": voxels * 12 / 1000}
    assert record["quality"]["organs"].keys() == {"liver", "lung", "bone"}
    assert record["warnings"] == []
    assert record["files"] == {
        "ct": "tiny_seed3_ct.nii.gz",
        "labels": "tiny_seed3_labels.nii.gz",
        "picture": "tiny_seed3.png",
    }


def test_record_of_what_was_not_asked_for(model, mask, tmp_path):
    shutil.copytree(model, tmp_path / "guided")
    index = tmp_path / "guided" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "guidance_scale": 2.0}))
    label_map = make_label_map()
    hu = np.where(np.asarray(label_map.dataobj) > 0, 40, -1000).astype(np.int16)
    nib.Nifti1Image(hu, label_map.affine).to_filename(tmp_path / "ct.nii.gz")
    options = ["--model", tmp_path / "guided", "--mask", mask, "--image", tmp_path / "ct.nii.gz", "--device", "cpu"]
    run("generate", *options, "--output", tmp_path / "out")
    arguments = json.loads((tmp_path / "out" / "guided_seed0.json").read_text())["arguments"]
    assert arguments["guidance_scale"] == 2.0
    assert arguments["body_image"] == arguments["image"] == str(tmp_path / "ct.nii.gz")


def test_variant(model, mask, tmp_path):
    MaisiCTPipeline.from_pretrained(model).save_pretrained(tmp_path / "tiny", variant="fp16")
    options = ["--model", tmp_path / "tiny", "--mask", mask, "--device", "cpu", "--output", tmp_path / "out"]
    assert "cannot be loaded" in error_of("generate", *options)
    assert run("generate", *options, "--variant", "fp16").exit_code == 0
    record = json.loads((tmp_path / "out" / "tiny_seed0.json").read_text())
    assert record["model"]["variant"] == "fp16"


def test_the_same_seed_gives_the_same_bytes(base, tmp_path):
    """Also of an image that was one of several."""
    run("generate", *base, "--num", 2, "--seed", 4)
    several = files_of(tmp_path / "out")
    assert several.keys() == names("tiny_seed4", "tiny_seed5")
    assert several["tiny_seed4_ct.nii.gz"] != several["tiny_seed5_ct.nii.gz"]
    run("generate", *base, "--seed", 5, "--force")
    assert files_of(tmp_path / "out") == several
    run("generate", *base[:-1], tmp_path / "alone", "--seed", 5)
    assert files_of(tmp_path / "alone").items() <= several.items()


def test_names(base, tmp_path):
    run("generate", *base, "--name", "one")
    run("generate", *base, "--name", "two", "--num", 2)
    assert files_of(tmp_path / "out").keys() == names("one", "two_000", "two_001")


def test_json(base, tmp_path):
    out = tmp_path / "out"
    said = run_json("generate", *base, "--num", 2)
    assert [image["seed"] for image in said["images"]] == [0, 1]
    first = said["images"][0]
    assert first["ct"] == str(out / "tiny_seed0_ct.nii.gz") and first["labels"] == str(
        out / "tiny_seed0_labels.nii.gz"
    )
    assert first["picture"] == str(out / "tiny_seed0.png") and first["record"] == str(out / "tiny_seed0.json")
    record = json.loads(Path(first["record"]).read_text())
    assert first["quality"] == record["quality"] and first["skipped"] is False


def test_quality_is_said(model, mask, tmp_path):
    pipe = MaisiCTPipeline.from_pretrained(model)
    pipe.register_to_config(quality_thresholds={"liver": [5000, 6000]})
    pipe.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--mask", mask, "--output", tmp_path / "out"]
    for retries, attempts in ((), 3), (("--quality-retries", 1), 2):
        result = run("generate", *options, *retries, "--force")
        assert "warning: image 0: the median of liver is " in result.stderr
        assert f"which should be 5000 to 6000 in the last of {attempts} attempts" in " ".join(result.stderr.split())
        record = json.loads((tmp_path / "out" / "model_seed0.json").read_text())
        assert record["attempts"] == attempts and record["quality"]["passed"] is False
        assert record["label_map"] is None and len(record["warnings"]) == 1

    result = run("generate", *options, "--no-quality-check", "--force")
    assert result.exit_code == 0 and "warning" not in result.stderr
    assert json.loads((tmp_path / "out" / "model_seed0.json").read_text())["quality"] is None


def test_a_ct_that_is_changed(base, mask, tmp_path):
    hu = np.random.default_rng(0).normal(0, 300, SIZE).astype(np.int16)
    own = tmp_path / "own.nii.gz"
    nib.Nifti1Image(hu, nib.load(mask).affine).to_filename(own)
    options = ["--image", own, "--repaint", "hepatic tumor", "--feather", 0]
    assert run("generate", *base, *options).exit_code == 0
    out = tmp_path / "out"
    made, labels = (np.asarray(nib.load(out / f"tiny_seed0_{kind}.nii.gz").dataobj) for kind in ("ct", "labels"))
    assert np.array_equal(labels, nib.load(mask).dataobj)
    changed = made != hu
    assert changed[labels == 26].any() and not changed[labels != 26].any()
    arguments = json.loads((out / "tiny_seed0.json").read_text())["arguments"]
    assert arguments["repaint_labels"] == ["hepatic tumor"] and arguments["image"] == str(own)

    assert run("generate", *base, "--image", own, "--strength", 0, "--force").exit_code == 0
    assert np.array_equal(nib.load(out / "tiny_seed0_ct.nii.gz").dataobj, hu)
    message = error_of("generate", *base, "--repaint", "liver", "--force")
    assert message.startswith("--repaint says how image is changed, and there is none: give both")


def test_labels_that_are_kept(model, tmp_path):
    options = ["--model", model, "--anatomy", "hepatic tumor", "--body-region", "abdomen", "--keep-only-anatomy"]
    assert run("generate", *options, "--output", tmp_path).exit_code == 0
    labels = np.asarray(nib.load(tmp_path / "tiny_seed0_labels.nii.gz").dataobj)
    assert set(np.unique(labels)) == {0, 26}


def looked_up(labels: Path) -> str:
    """Which label map of the database it is."""
    array = np.asarray(nib.load(labels).dataobj)
    (name,) = (
        name
        for name, (indices, size, spacing, _) in MASKS.items()
        if size == array.shape and np.array_equal(make_mask(indices, size, spacing).dataobj, array)
    )
    return name


def test_without_options_it_is_an_abdomen(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (image,) = run_json("generate", "--model", model)["images"]
    assert looked_up(tmp_path / image["labels"]) in ("abdomen/healthy", "abdomen/healthy too", "torso")
    assert json.loads(Path(image["record"]).read_text())["request"] == {"body_region": ["abdomen"]}


def test_looked_up_label_map(model, tmp_path):
    options = ["--body-region", "chest", "--anatomy", "lung tumor", "--anatomy", "heart"]
    (image,) = run_json("generate", "--model", model, "--output", tmp_path, *options)["images"]
    assert looked_up(image["labels"]) == "chest/tumor"
    record = json.loads(Path(image["record"]).read_text())
    assert record["arguments"]["output_size"] == list(SIZE)
    assert record["label_map"]["file"] == "chest/tumor.nii.gz" and not record["label_map"]["tumors"][0]["is_moved"]
    assert "lung tumor stays where it is" in record["warnings"][0]


def test_a_label_map_as_it_is(model, tmp_path):
    options = ["--model", model, "--output", tmp_path, "--anatomy", "hepatic tumor", "--body-region", "abdomen"]
    (image,) = run_json("generate", *options, "--as-is")["images"]
    assert looked_up(image["labels"]) == "abdomen/liver"
    assert json.loads(Path(image["record"]).read_text())["label_map"]["tumors"] == []


def test_generated_label_map(model, tmp_path):
    options = ["--size", "liver=0.5", "--size", "hepatic tumor=0.3", "--output-size", 24, 24, 24, "--spacing", 1, 1, 1]
    (image,) = run_json("generate", "--model", model, "--output", tmp_path, *options)["images"]
    expected = MaisiCTPipeline.from_pretrained(model)(
        controllable_anatomy_size=[("liver", 0.5), ("hepatic tumor", 0.3)],
        output_size=(24, 24, 24),
        spacing=(1.0, 1.0, 1.0),
        generator=seeded(),
    )
    assert np.array_equal(nib.load(image["labels"]).dataobj, expected.labels[0].dataobj)
    assert np.array_equal(nib.load(image["ct"]).dataobj, expected.images[0].dataobj)


def test_image_only(model, tmp_path):
    (image,) = run_json("generate", "--model", model, "--output", tmp_path, "--image-only", "--modality", "mri_t1")[
        "images"
    ]
    assert image["labels"] is None and image["quality"] is None
    assert files_of(tmp_path).keys() == names("tiny_seed0") - {"tiny_seed0_labels.nii.gz"}


def test_an_image_without_labels_replaces_one_with(base, model, tmp_path):
    run("generate", *base)
    run("generate", "--model", model, "--output", tmp_path / "out", "--image-only", "--force")
    assert files_of(tmp_path / "out").keys() == names("tiny_seed0") - {"tiny_seed0_labels.nii.gz"}


def test_own_label_map_and_back(model, tmp_path, torso_ct, torso_labels):
    options = [
        "--mask",
        torso_labels,
        "--mask-vocabulary",
        "totalsegmentator",
        "--body-image",
        torso_ct,
        "--restore-grid",
    ]
    result = run(
        "generate", "--model", model, "--output", tmp_path, *options, "--output-size", 24, 24, 24, "--steps", 1
    )
    ct = tmp_path / "tiny_seed0_ct.nii.gz"
    assert result.stdout.startswith(f"{ct}: 122 x 101 x 112 voxels of 3 x 3 x 3 mm, "), result.output
    assert "not in the label map any more" in result.stderr
    assert nib.load(ct).shape == nib.load(torso_labels).shape
    record = json.loads((tmp_path / "tiny_seed0.json").read_text())
    assert (record["size"], record["spacing"]) == ([122, 101, 112], [3.0, 3.0, 3.0])
    arguments = record["arguments"]
    assert (arguments["output_size"], arguments["num_inference_steps"]) == ([24, 24, 24], 1)
    assert np.allclose(arguments["spacing"], [122 * 3 / 24, 101 * 3 / 24, 112 * 3 / 24])


def test_tiling_and_dtype(base, tmp_path):
    run("generate", *base, "--tiling", "exact", "--memory", "1MB", "--dtype", "bfloat16")
    record = json.loads((tmp_path / "out" / "tiny_seed0.json").read_text())
    assert record["tiling"] == "exact" and record["dtype"] == "bfloat16"


def test_resume(base, tmp_path):
    out = tmp_path / "out"
    run("generate", *base, "--num", 3)
    complete = files_of(out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "tiny_seed1.json").unlink()  # so that image 1 is not complete
    shutil.copy(out / "tiny_seed0_ct.nii.gz", out / "tiny_seed1_ct.nii.gz")
    said = run_json("generate", *base, "--num", 4, "--resume")
    assert [image["skipped"] for image in said["images"]] == [True, False, True, False]
    assert files_of(out).items() >= complete.items()
    assert files_of(out).keys() == names(*(f"tiny_seed{i}" for i in range(4)))
    made_again = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert made_again == names("tiny_seed1")


@pytest.mark.parametrize("ending", ["_ct.nii.gz", "_labels.nii.gz", ".png"])
def test_resume_makes_an_image_again_that_lacks_a_file(base, tmp_path, ending):
    run("generate", *base)
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / f"tiny_seed0{ending}").unlink()
    assert [image["skipped"] for image in run_json("generate", *base, "--resume")["images"]] == [False]
    assert files_of(tmp_path / "out") == before


def test_resume_with_everything_there_loads_nothing(base, monkeypatch):
    run("generate", *base)
    monkeypatch.setattr(generation, "load_pipeline", None)
    assert [image["skipped"] for image in run_json("generate", *base, "--resume")["images"]] == [True]


def test_resume_refuses_other_settings(base, tmp_path):
    run("generate", *base)
    before = files_of(tmp_path / "out")
    message = error_of("generate", *base, "--resume", "--guidance-scale", 2)
    assert "tiny_seed0.json was made with guidance_scale=None, not 2.0: --force it" in message
    assert files_of(tmp_path / "out") == before
    record = json.loads(before["tiny_seed0.json"])
    for broken in ({}, record | {"files": None}):
        (tmp_path / "out" / "tiny_seed0.json").write_text(json.dumps(broken))
        assert "tiny_seed0.json is no record of an image" in error_of("generate", *base, "--resume")


@pytest.mark.parametrize("ending", ["_ct.nii.gz", "_labels.nii.gz", ".png"])
def test_resume_keeps_files_of_others(base, tmp_path, ending, monkeypatch):
    """Whatever runs that were killed have left."""
    monkeypatch.setattr(generation, "load_pipeline", None)  # nothing is loaded to tell it
    file = tmp_path / "out" / f"tiny_seed1{ending}"
    file.parent.mkdir()
    make_label_map().to_filename(file) if ending.endswith(".nii.gz") else file.write_text("mine")
    before = files_of(tmp_path / "out")
    message = error_of("generate", *base, "--num", 3, "--resume")
    assert message.startswith(f"{file} is there and was not made by this command: --force, or choose another")
    assert files_of(tmp_path / "out") == before


def test_resume_of_an_image_without_labels_keeps_a_label_map_of_others(model, tmp_path):
    options = ["--model", model, "--image-only", "--output", tmp_path]
    run("generate", *options)
    make_label_map().to_filename(tmp_path / "tiny_seed0_labels.nii.gz")
    before = files_of(tmp_path)
    assert [image["skipped"] for image in run_json("generate", *options, "--resume")["images"]] == [True]
    (tmp_path / "tiny_seed0.png").unlink()
    assert "tiny_seed0_labels.nii.gz is there and was not made" in error_of("generate", *options, "--resume")
    assert files_of(tmp_path) == {name: content for name, content in before.items() if name != "tiny_seed0.png"}


@pytest.mark.parametrize("left", [("_ct.nii.gz",), ("_ct.nii.gz", "_labels.nii.gz"), ENDINGS[:-1]])
def test_resume_after_a_run_that_was_killed(base, tmp_path, left):
    """As its files got their names, the record last."""
    run("generate", *base)
    complete = files_of(tmp_path / "out")
    for ending in set(ENDINGS) - set(left):
        (tmp_path / "out" / f"tiny_seed0{ending}").unlink()
    assert [image["skipped"] for image in run_json("generate", *base, "--resume")["images"]] == [False]
    assert files_of(tmp_path / "out") == complete


@pytest.mark.parametrize("ending", ENDINGS)
def test_existing_files_are_kept(base, tmp_path, ending, monkeypatch):
    monkeypatch.setattr(generation, "load_pipeline", None)  # nothing is loaded to tell it
    file = tmp_path / "out" / f"tiny_seed1{ending}"
    file.parent.mkdir()
    file.write_text("mine")
    message = error_of("generate", *base, "--num", 3)
    assert message.startswith(f"{file} is there already: --force, or choose another")
    assert files_of(tmp_path / "out") == {file.name: b"mine"}


BAD = {
    "no such region": (["--body-region", "leg"], "--body-region 'leg' is unknown; use one of head, "),
    "no such anatomy": (["--anatomy", "lung tumour"], "No anatomy is called 'lung tumour'; use 'lung tumor'"),
    "not in the database": (
        ["--anatomy", "prostate"],
        "no label map with prostate is among the 11 of the mask database",
    ),
    "no such size": (
        ["--body-region", "chest", "--output-size", "64", "64", "256"],
        "no label map in chest is large enough for --output-size (64, 64, 256) with --spacing (0.75, 0.5, 0.375); the",
    ),
    "size out of range": (["--size", "liver=2"], "the size 2.0 of 'liver' is not allowed: give 0 to 1"),
    "no controllable size": (["--size", "heart=0.5"], "'heart' has no controllable size: use one of gallbladder"),
    "two label maps": (
        ["--anatomy", "liver", "--mask", "{mask}"],
        "mask and --anatomy both say what the label map is: leave one out",
    ),
    "image only": (
        ["--image-only", "--mask", "{mask}"],
        "--image-only makes an image without labels and contradicts mask",
    ),
    "odd size": (
        ["--image-only", "--output-size", "9", "9", "9"],
        "--output-size (9, 9, 9) does not divide by 8, the downsampling of VAE and UNet",
    ),
    "negative spacing": (
        ["--image-only", "--spacing", "-1", "1", "1"],
        "--spacing (-1.0, 1.0, 1.0) is not allowed: give three positive numbers of mm",
    ),
    "modality": (["--image-only", "--modality", "xray"], "Modality 'xray' is unknown; use one of unknown, ct, "),
    "guidance": (
        ["--image-only", "--guidance-scale", "-1"],
        "--guidance-scale -1.0 is not allowed: give 0 (off) or more",
    ),
    "steps": (["--image-only", "--steps", "5000"], "--steps 5000 is not allowed: give a whole number from 1 to 1000"),
    "restore grid": (
        ["--image-only", "--restore-grid"],
        "--restore-grid puts the output on the grid of --mask and needs",
    ),
    "body image": (["--image-only", "--body-image", "{mask}"], "--body-image is the CT that --mask was drawn on"),
    "device": (["--image-only", "--device", "gpu"], "--device gpu is not known: use auto, cpu, cuda, mps or xpu"),
}


@pytest.mark.parametrize(("options", "says"), BAD.values(), ids=BAD)
def test_bad_values(model, mask, tmp_path, options, says):
    options = [option.format(mask=mask) for option in options]
    message = error_of("generate", "--model", model, "--output", tmp_path / "new" / "out", *options)
    assert message.startswith(says)
    assert not (tmp_path / "new" / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "liver"], "--size 'liver' is no pair of name and size: give it like --size liver=0.5"),
        (["--seed", str(2**63)], f"--seed {2**63} is too large"),
        (["--memory", "4GiB"], "--memory 4GiB bounds slabs: give it with --tiling exact or --tiling lean"),
        (["--name", "a/b"], "--name 'a/b' is no name of a file"),
        (["--name", ""], "--name '' is no name of a file"),
        (["--force", "--resume"], "give one of them"),
    ],
)
def test_contradictions(model, tmp_path, options, says):
    assert says in error_of("generate", "--model", model, "--output", tmp_path / "out", *options, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_no_such_device(base):
    for device in ("cuda", "mps", "cuda:7"):
        assert error_of("generate", *base, "--device", device).startswith(
            f"--device {device} is not there, this machine"
        )


def test_no_such_model(tmp_path):
    out = ["--output", tmp_path / "out"]
    assert "neither a folder nor a Hub id" in error_of("generate", "--model", tmp_path / "missing", *out)
    (tmp_path / "empty").mkdir()
    message = error_of("generate", "--model", tmp_path / "empty", *out)
    assert "has no model_index.json, so it is no diffusers repository" in message and "maisi-ct convert" in message
    said = run("generate", "--model", "nobody/nothing", *out, "--json")
    assert (said.exit_code, said.stderr) == (1, "")
    error = json.loads(said.stdout)
    assert error["exit_code"] == 1 and error["error"].startswith(
        "'nobody/nothing' at revision=None is neither a folder"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"])
def test_damaged_model(model, mask, tmp_path, file):
    shutil.copytree(model, tmp_path / "tiny")
    damaged = tmp_path / "tiny" / file
    damaged.write_bytes(damaged.read_bytes()[:200])
    message = error_of("generate", "--model", tmp_path / "tiny", "--mask", mask, "--output", tmp_path / "out")
    assert message.startswith(f"the model {tmp_path / 'tiny'} cannot be loaded: ")


def test_damaged_label_map(model, tmp_path):
    (tmp_path / "mask.nii.gz").write_text("no image")
    message = error_of("generate", "--model", model, "--mask", tmp_path / "mask.nii.gz", "--output", tmp_path / "out")
    assert message.startswith(f"'{tmp_path / 'mask.nii.gz'}' cannot be read as NIfTI")


def test_output_that_is_a_file(base, tmp_path):
    (tmp_path / "out").write_text("")
    assert error_of("generate", *base) == f"{tmp_path / 'out'}: File exists"
    below = tmp_path / "out" / "below"
    assert error_of("generate", *base[:-1], below) == f"{below}: Not a directory"


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_of_a_write_that_fails(base, tmp_path, ending, monkeypatch):
    """As on a full disk; what was there before stays."""
    run("generate", *base)
    before = files_of(tmp_path / "out")

    def fail(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if ending == ".png":
        monkeypatch.setattr(generation, "save_preview", fail)
    elif ending == ".json":
        monkeypatch.setattr(generation.Path, "write_text", fail)
    else:
        save = nib.Nifti1Image.to_filename

        def fail_at(image, path, *args, **kwargs):
            fail(path) if path.name.endswith(ending) else save(image, path, *args, **kwargs)

        monkeypatch.setattr(nib.Nifti1Image, "to_filename", fail_at)
    message = error_of("generate", *base, "--num", 2, "--seed", 1)
    assert message == f"{tmp_path / 'out'} cannot be written to: No space left on device"
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), MemoryError()],
)
@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("from_pretrained", "for this model: try --dtype bfloat16, or another --device"),
        ("decode", "for this size: try a smaller --output-size"),
    ],
)
def test_too_little_memory(base, monkeypatch, part, says, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(MaisiCTPipeline, part, fail)
    assert error_of("generate", *base) == f"there is not enough memory on cpu {says}"


def test_the_embedded_model(tmp_path, model, monkeypatch):
    monkeypatch.setattr("maisi_diffusers.cli.models.PHANTOM_TINY", model)
    (image,) = run_json("generate", "--output", tmp_path / "out")["images"]
    assert json.loads(Path(image["record"]).read_text())["model"] == {
        "name": "tiny",
        "source": "tiny",
        "revision": None,
    }
    monkeypatch.setattr("maisi_diffusers.cli.models.PHANTOM_TINY", tmp_path / "missing")
    assert "the embedded model is not in this installation" in error_of("generate", "--output", tmp_path / "out")


@pytest.mark.slow
def test_model_of_the_hub(model, mask, tmp_path):
    shutil.copytree(model, tmp_path / "root" / "owner" / "tiny")
    hub = HubServer(tmp_path / "root", tags={"owner/tiny": {"v1"}})
    try:
        with process_on(hub, tmp_path / "home") as process:
            options = [
                "--model",
                "owner/tiny",
                "--revision",
                "v1",
                "--body-region",
                "abdomen",
                "--output",
                tmp_path / "out",
            ]
            (image,) = process.submit(run_json, "generate", *options).result()["images"]
    finally:
        hub.stop()
    record = json.loads(Path(image["record"]).read_text())
    assert record["model"] == {"name": "tiny", "source": "owner/tiny", "revision": hub.commit("owner/tiny")}
    local = run_json("generate", "--model", model, "--body-region", "abdomen", "--output", tmp_path / "local")[
        "images"
    ][0]
    assert Path(image["ct"]).read_bytes() == Path(local["ct"]).read_bytes()


def test_pipeline_without_database(tmp_path):
    make_pipeline(with_mask_networks=False).save_pretrained(tmp_path / "bare")
    assert "no mask database to look one up in" in error_of("generate", "--model", tmp_path / "bare")
