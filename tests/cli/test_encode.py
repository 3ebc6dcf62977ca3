"""`maisi-ct encode`: latents and their list, whatever happens on the way."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_diffusers import AutoencoderKLMaisi, MaisiMaskPipeline
from maisi_diffusers.anatomy import load_label_map
from maisi_diffusers.cli import encode as command
from maisi_diffusers.imaging import load_volume, resample_like, to_ras
from maisi_diffusers.loaders import load_maisi_checkpoint
from maisi_diffusers.training import encode_dataset
from maisi_diffusers.training.checks import check_cases
from maisi_diffusers.training.data_list import Case, DataList, read_data_list, write_data_list
from maisi_diffusers.training.latents import draw_latent, encode_volume, load_latent, resize_volume, to_intensities
from tests.scripts.training_data import SCRIPTS
from tests.tiny import make_pipeline

# Parts of the real CT, small enough for a test.
PARTS = {"a/ct": np.s_[20:64, 30:66, 40:72], "b/ct": np.s_[40:72, 30:74, 60:84]}
SIZES = {"a/ct": (48, 32, 32), "b/ct": (32, 48, 32)}  # the nearest multiples of 16
TUMOR = 129


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(with_mask_networks=False)


@pytest.fixture(scope="module")
def vae(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "vae"
    pipe.vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real_data(torso_ct, torso_labels, tmp_path_factory):
    """A data list of two parts of the real CT with their label maps, one in LPS; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    ct, labels = load_volume(torso_ct), load_label_map(torso_labels, "totalsegmentator")
    lps = nib.orientations.axcodes2ornt(("L", "P", "S"))
    for name, part in PARTS.items():
        (folder / name).parent.mkdir()
        image, label = ct.slicer[part], labels.slicer[part]
        data = np.array(label.dataobj)
        data[10:20, 10:20, 10:20] = TUMOR
        label = nib.Nifti1Image(data, label.affine)
        if name == "a/ct":
            image, label = image.as_reoriented(lps), label.as_reoriented(lps)
        image.to_filename(folder / f"{name}.nii.gz")
        label.to_filename(folder / f"{name}_mask.nii.gz")
    cases = [
        Case(
            folder / f"{name}.nii.gz",
            folder / f"{name}_mask.nii.gz",
            top_region_index=(0, 0, 1, 0),
            bottom_region_index=(0, 0, 0, 1),
            modality="ct_contrast",
            fold=fold,
        )
        for fold, name in enumerate(PARTS)
    ]
    data_list = DataList(cases, {"kidney tumor": TUMOR}, {"kidney tumor": ["left kidney"]})
    write_data_list(folder / "dataset.json", data_list)
    return folder


@pytest.fixture
def data(real_data, tmp_path):
    """A copy to change."""
    return shutil.copytree(real_data, tmp_path / "data")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "latents"


@pytest.fixture
def encode(vae, output):
    def encode(source, *options, output=output, vae=vae, multiple=16):
        source = (
            ["--data_list", source / "dataset.json"] if (source / "dataset.json").is_file() else ["--images", source]
        )
        arguments = [*source, "--vae", vae, "--output_dir", output, "--size_multiple", multiple, *options]
        if multiple is None:
            del arguments[6:8]
        command.main([str(argument) for argument in arguments])

    return encode


@pytest.fixture(scope="module")
def encoded(real_data, vae, tmp_path_factory):
    """What comes of the data list with default options; not to be changed."""
    output = tmp_path_factory.mktemp("encoded")
    arguments = ["--data_list", real_data / "dataset.json", "--vae", vae, "--output_dir", output]
    command.main([*map(str, arguments), "--size_multiple", "16"])
    return output


def error_of(encode, *arguments, **kwargs):
    """The line that the script ends in."""
    with pytest.raises(SystemExit) as exit_:
        encode(*arguments, **kwargs)
    message = exit_.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(data, **values):
    """Rewrite the first entry of a data list."""
    data_list = read_data_list(data / "dataset.json")
    cases = [replace(data_list.cases[0], **values), *data_list.cases[1:]]
    write_data_list(data / "dataset.json", replace(data_list, cases=cases))


def test_files_and_list(encoded, real_data):
    files = {f"{name}_{kind}.nii.gz" for name in PARTS for kind in ("emb", "label")}
    assert set(contents(encoded)) == files | {"latents.json", "encode.json"}

    content = json.loads((encoded / "latents.json").read_text())
    assert content["label_names"] == {"kidney tumor": TUMOR}
    assert content["tumor_organs"] == {"kidney tumor": ["left kidney"]}
    fov = {name: np.multiply(load_volume(real_data / f"{name}.nii.gz").shape, 3.0) for name in PARTS}
    for fold, (entry, (name, size)) in enumerate(zip(content["training"], SIZES.items())):
        np.testing.assert_allclose(np.multiply(entry.pop("spacing"), size), fov[name], rtol=1e-5)
        assert entry == {
            "image": f"{name}_emb.nii.gz",
            "label": f"{name}_label.nii.gz",
            "dim": list(size),
            "top_region_index": [0, 0, 1, 0],
            "bottom_region_index": [0, 0, 0, 1],
            "modality": "ct_contrast",
            "fold": fold,
        }
    assert all(
        case.image.is_file() and case.label.is_file() for case in read_data_list(encoded / "latents.json").cases
    )


def test_for_programs(encode, data, output, capsys):
    first = next(iter(PARTS))
    (data / f"{first}.nii.gz").write_text("no image")
    with pytest.raises(SystemExit) as exit_:
        encode(data, "--json")
    told = json.loads(capsys.readouterr().out)
    assert exit_.value.code == told["exit_code"] == 1
    assert (told["data_list"], told["cases"]) == (str(output / "latents.json"), len(PARTS))
    assert told["failed"] == [first] and first in told["error"]


@pytest.mark.parametrize("name", PARTS)
def test_latent_is_the_posterior_of_the_volume(encoded, real_data, pipe, name):
    volume = to_ras(load_volume(real_data / f"{name}.nii.gz"))
    volume = resize_volume(to_intensities(volume, 1), SIZES[name])
    assert torch.equal(load_latent(encoded / f"{name}_emb.nii.gz", 8), encode_volume(pipe.vae, volume))
    header = nib.load(encoded / f"{name}_emb.nii.gz").header
    assert header["descrip"].item().startswith(b"MAISI latent: moments; encode.json ")


@pytest.mark.parametrize("name", PARTS)
def test_label_is_on_the_grid_of_the_volume(encoded, real_data, name):
    latent, label = (nib.load(encoded / f"{name}_{kind}.nii.gz") for kind in ("emb", "label"))
    assert label.shape == tuple(4 * n for n in latent.shape[:3]) == SIZES[name]
    assert label.get_data_dtype() == np.uint8 and nib.aff2axcodes(label.affine) == ("R", "A", "S")
    for corner in ((0, 0, 0), (1, 1, 1)):
        outer = [
            nib.affines.apply_affine(image.affine, np.multiply(corner, image.shape[:3]) - 0.5)
            for image in (latent, label)
        ]
        np.testing.assert_allclose(outer[0], outer[1], atol=1e-3)
    # The tumor is where it was, in mm, and as large.
    source = to_ras(load_label_map(real_data / f"{name}_mask.nii.gz"))
    expected = np.asarray(resample_like(source, label, order=0, fill=0).dataobj)
    assert np.array_equal(label.dataobj, expected) and len(np.unique(expected)) > 5
    volumes, centres = [], []
    for image in (source, label):
        tumor = np.argwhere(np.asarray(image.dataobj) == TUMOR)
        volumes.append(len(tumor) * abs(np.linalg.det(image.affine)))
        centres.append(nib.affines.apply_affine(image.affine, tumor.mean(axis=0)))
    assert volumes[1] == pytest.approx(volumes[0], rel=0.2)
    np.testing.assert_allclose(centres[0], centres[1], atol=1.5)
    assert b"synthetic" not in label.header["descrip"].item()


def test_posteriors(encode, encoded, real_data, output):
    for posterior in ("mean", "sample"):
        encode(real_data, "--posterior", posterior, output=output / posterior)
    stored = {name: load_latent(encoded / f"{name}_emb.nii.gz", 8) for name in PARTS}
    mean, sample = (
        {name: load_latent(output / p / f"{name}_emb.nii.gz") for name in PARTS} for p in ("mean", "sample")
    )
    noise = []
    for name, moments in stored.items():
        assert torch.equal(mean[name], draw_latent(moments))
        noise.append(((sample[name] - moments[:4]) / torch.exp(0.5 * moments[4:])).flatten())
        assert noise[-1].mean().abs() < 0.1 and 0.9 < noise[-1].std() < 1.1
    assert not torch.allclose(noise[0], noise[1], atol=0.1)  # of their own


def test_a_draw_depends_on_seed_and_name_alone(encode, data, output):
    encode(data, "--posterior", "sample", output=output / "both")
    encode(data, "--posterior", "sample", "--seed", "1", output=output / "seed 1")
    data_list = read_data_list(data / "dataset.json")
    write_data_list(data / "dataset.json", replace(data_list, cases=data_list.cases[1:]))
    encode(data, "--posterior", "sample", output=output / "alone")
    both, seed_1, alone = (load_latent(output / run / "b/ct_emb.nii.gz") for run in ("both", "seed 1", "alone"))
    assert torch.equal(both, alone) and not torch.equal(both, seed_1)


def test_sizes(encode, real_data, output):
    encode(real_data, "--size", "16", "24", "32", multiple=None)
    for case in read_data_list(output / "latents.json").cases:
        assert case.dim == (16, 24, 32) and load_latent(case.image).shape == (4, 4, 6, 8)


def test_folder_of_images(encode, data, pipe):
    """All of one modality, whatever is hidden or written by the script itself left out."""
    (data / "dataset.json").unlink()
    for mask in data.rglob("*_mask.nii.gz"):
        mask.unlink()
    (data / "._ct.nii.gz").write_bytes(b"resource fork")
    (data / "notes.txt").write_text("none")
    for _ in range(2):
        encode(data, "--modality", "mri_t1", output=data / "latents")
    cases = read_data_list(data / "latents" / "latents.json").cases
    assert [case.image for case in cases] == [data / "latents" / f"{name}_emb.nii.gz" for name in PARTS]
    assert all(case.modality == "mri_t1" and case.label is None for case in cases)
    volume = to_intensities(to_ras(load_volume(data / "a/ct.nii.gz")), 9)
    expected = encode_volume(pipe.vae, resize_volume(volume, SIZES["a/ct"]))
    assert torch.equal(load_latent(cases[0].image, 8), expected)


def test_names_must_differ(encode, data, output):
    nib.load(data / "a/ct.nii.gz").to_filename(data / "a/ct.nii")
    (data / "dataset.json").unlink()
    message = error_of(encode, data)
    assert "a/ct.nii.gz" in message and "a/ct.nii " in message and "rename one" in message
    assert not output.exists()


def test_images_from_elsewhere(encode, data, output, tmp_path):
    """A path outside of the list's folder gives its file name, never a place outside of the output."""
    (tmp_path / "elsewhere").mkdir()
    image = (data / "a/ct.nii.gz").rename(tmp_path / "elsewhere" / "scan.nii.gz")
    change(data, image=image)
    encode(data)
    assert {path for path in contents(output) if "_emb" in path} == {"scan_emb.nii.gz", "b/ct_emb.nii.gz"}


def test_inputs_are_not_overwritten(encode, data):
    label = (data / "a/ct_mask.nii.gz").rename(data / "a/ct_label.nii.gz")
    change(data, label=label)
    before = contents(data)
    assert "a/ct_label.nii.gz is an input" in error_of(encode, data, output=data)
    assert contents(data) == before


def test_resume(encode, encoded, real_data, output, monkeypatch):
    """Only what is missing is made, and it is what it would have been."""
    shutil.copytree(encoded, output)
    (output / "a/ct_emb.nii.gz").unlink()
    (output / "b/ct_label.nii.gz").unlink()
    (output / "latents.json").unlink()
    made = []
    encode_case = encode_dataset.encode_case
    monkeypatch.setattr(
        encode_dataset, "encode_case", lambda case, name, *rest: made.append(name) or encode_case(case, name, *rest)
    )
    encode(real_data)
    assert made == ["a/ct", "b/ct"] and contents(output) == contents(encoded)
    encode(real_data)
    assert made == ["a/ct", "b/ct"]
    (output / "b/ct_emb.nii.gz").write_bytes(b"cut")
    encode(real_data)
    assert made[2:] == ["b/ct"] and contents(output) == contents(encoded)


def test_changed_files_are_encoded_again(encode, encoded, data, output):
    """Also where only the label map has changed, and what the list says of a case."""
    shutil.copytree(encoded, output)
    encode(data)
    assert contents(output) == contents(encoded)

    path = data / "a/ct_mask.nii.gz"
    labels = nib.load(path)
    relabelled = np.where(np.asarray(labels.dataobj) == TUMOR, 26, labels.dataobj).astype(np.uint8)
    nib.Nifti1Image(relabelled, labels.affine).to_filename(path)
    later = (output / "a/ct_emb.nii.gz").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    encode(data)
    changed = {name for name, content in contents(output).items() if content != contents(encoded)[name]}
    assert changed == {"a/ct_label.nii.gz"}
    assert not (np.asarray(nib.load(output / "a/ct_label.nii.gz").dataobj) == TUMOR).any()

    change(data, modality="mri_t1")
    encode(data)
    changed = {name for name, content in contents(output).items() if content != contents(encoded)[name]}
    assert changed == {"a/ct_emb.nii.gz", "a/ct_label.nii.gz", "latents.json"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seed", "1"], "seed=0, not 1"),
        (["--posterior", "mean"], "posterior='moments', not 'mean'"),
        (["--dtype", "bfloat16"], "dtype='float32', not 'bfloat16'"),
        (["--size", "32", "32", "32"], "size=None, not [32, 32, 32]"),
    ],
)
def test_other_settings_are_refused(encode, encoded, real_data, options, says):
    before = contents(encoded)
    message = error_of(encode, real_data, *options, output=encoded, multiple=None if "--size" in options else 16)
    assert says in message and "another --output_dir, or --overwrite" in message
    assert contents(encoded) == before


def test_another_vae_is_refused(encode, encoded, real_data, tmp_path):
    other = make_pipeline(with_mask_networks=False, seed=1).vae
    other.save_pretrained(tmp_path / "other")
    assert "made with vae=" in error_of(encode, real_data, output=encoded, vae=tmp_path / "other")


@pytest.mark.parametrize("name", ["a/ct_emb.nii.gz", "b/ct_label.nii.gz", "latents.json"])
def test_others_files_are_refused(encode, encoded, real_data, output, name):
    """Such as the latents of others, which have the same names."""
    (output / name).parent.mkdir(parents=True)
    (output / name).write_bytes(b"theirs")
    message = error_of(encode, real_data)
    assert f"{output / name} is a file that this script did not write" in message and "or --overwrite it" in message
    assert contents(output) == {name: b"theirs"}
    encode(real_data, "--overwrite")
    assert contents(output) == contents(encoded)


def test_overwrite_goes_on_where_it_was_interrupted(encode, encoded, real_data, output, monkeypatch):
    """No latent of the old settings is taken for one of the new ones."""
    shutil.copytree(encoded, output)
    encode_case = encode_dataset.encode_case

    def interrupted(case, name, *rest):
        if name == "b/ct":
            raise KeyboardInterrupt
        encode_case(case, name, *rest)

    monkeypatch.setattr(encode_dataset, "encode_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(real_data, "--posterior", "mean", "--overwrite")
    shutil.copy(encoded / "b/ct_emb.nii.gz", output / "b/ct_emb.nii.gz")
    monkeypatch.undo()
    encode(real_data, "--posterior", "mean")
    for name in PARTS:
        found = nib.load(output / f"{name}_emb.nii.gz").get_fdata(dtype=np.float32)
        assert np.array_equal(found, nib.load(encoded / f"{name}_emb.nii.gz").get_fdata(dtype=np.float32)[..., :4])


def _with_nan(path):
    image = nib.load(path)
    data = image.get_fdata(dtype=np.float32)
    data[3, 3, 3] = np.nan
    nib.Nifti1Image(data, image.affine).to_filename(path)


def _elsewhere(path):
    image = nib.load(path)
    affine = image.affine.copy()
    affine[:3, 3] += 1000
    nib.Nifti1Image(np.asarray(image.dataobj), affine).to_filename(path)


@pytest.mark.parametrize(
    ("file", "spoil", "says"),
    [
        ("ct", lambda path: path.unlink(), "No file"),
        ("ct", lambda path: path.write_bytes(path.read_bytes()[:2000]), "is damaged or cut short"),
        ("ct", _with_nan, "has NaN or infinite voxels"),
        ("ct_mask", lambda path: path.unlink(), "No file"),
        ("ct_mask", _elsewhere, "has no label where the image is"),
    ],
)
def test_bad_files_are_left_out(encode, encoded, data, output, capsys, file, spoil, says):
    spoil(data / f"a/{file}.nii.gz")
    message = error_of(encode, data)
    assert message == "error: 1 of 2 cases failed and are not in the list: a/ct"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("a/ct: ")]
    assert len(lines) == 1 and says in lines[0] and f"a/{file}.nii.gz" in lines[0]
    assert [case.image.name for case in read_data_list(output / "latents.json").cases] == ["ct_emb.nii.gz"]
    assert not (output / "a/ct_emb.nii.gz").exists()
    assert (output / "b/ct_emb.nii.gz").read_bytes() == (encoded / "b/ct_emb.nii.gz").read_bytes()


def test_a_file_that_went_bad_leaves_the_list(encode, encoded, data, output):
    """What it was encoded to stays, as long as nothing takes its place."""
    shutil.copytree(encoded, output)
    (data / "a/ct.nii.gz").unlink()
    assert "1 of 2 cases failed" in error_of(encode, data, "--overwrite")
    assert [case.image for case in read_data_list(output / "latents.json").cases] == [output / "b/ct_emb.nii.gz"]
    kept = contents(output)
    assert all(kept[f"a/ct_{kind}.nii.gz"] == contents(encoded)[f"a/ct_{kind}.nii.gz"] for kind in ("emb", "label"))


def test_nothing_is_replaced_before_all_is_encoded(encode, encoded, data, output, monkeypatch):
    shutil.copytree(encoded, output)
    mask = nib.load(data / "a/ct_mask.nii.gz")
    nib.Nifti1Image(np.ones(mask.shape, np.uint8), mask.affine).to_filename(data / "a/ct_mask.nii.gz")

    def encode_volume(vae, volume):
        raise MemoryError("too large")

    monkeypatch.setattr(encode_dataset, "encode_volume", encode_volume)
    assert "2 of 2 cases failed" in error_of(encode, data, "--overwrite")
    assert contents(output) == contents(encoded)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])  # of a GPU, of the CPU
def test_volumes_too_large(encode, real_data, output, monkeypatch, capsys, error):
    def encode_volume(vae, volume):
        raise error("can't allocate memory: you tried\n20.00 GiB.")

    monkeypatch.setattr(encode_dataset, "encode_volume", encode_volume)
    assert "2 of 2 cases failed" in error_of(encode, real_data)
    reason = "out of memory (can't allocate memory: you tried 20.00 GiB.)"
    err = capsys.readouterr().err
    assert all(f"{name}: {reason}" in err for name in PARTS)
    assert not (output / "latents.json").exists()


def test_labels_lost_on_the_grid(encode, data, capsys):
    """Structures that the grid is too coarse for are named, new classes by their names."""
    path = data / "a/ct_mask.nii.gz"
    image = nib.load(path)
    labels = image.get_fdata().astype(np.uint8)
    labels[labels == TUMOR] = 0
    labels[11, 11, 11] = TUMOR
    nib.Nifti1Image(labels, image.affine).to_filename(path)
    encode(data, "--size", "8", "8", "8", multiple=None)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("a/ct: "))
    assert "too small for (8, 8, 8) voxels" in line and line.endswith("kidney tumor")


@pytest.mark.parametrize("options", [("off",), ("exact",), ("lean", "--memory", "1MB")])
def test_tiling(encode, encoded, real_data, output, options):
    encode(real_data, "--tiling", *options)
    for name in PARTS:
        tiled, whole = (load_latent(folder / f"{name}_emb.nii.gz") for folder in (output, encoded))
        assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 1e-4


def test_half_precision(encode, encoded, real_data, output):
    encode(real_data, "--dtype", "bfloat16")
    half, whole = (nib.load(folder / "a/ct_emb.nii.gz").get_fdata()[..., :4] for folder in (output, encoded))
    assert 0 < np.abs(half - whole).max() < 0.1 * np.abs(whole).max()


def test_sources_of_a_vae(encode, encoded, real_data, output, pipe, published, tmp_path):
    """A pipeline's and a published checkpoint's VAE are those that they hold."""
    pipe.save_pretrained(tmp_path / "pipeline")
    encode(real_data, vae=tmp_path / "pipeline", output=output / "pipeline")
    assert contents(output / "pipeline") == contents(encoded)

    load_maisi_checkpoint(published, "rflow-ct")["vae"].save_pretrained(tmp_path / "vae")
    encode(real_data, vae=tmp_path / "vae", output=output / "vae")
    encode(real_data, "--version", "rflow-ct", vae=published, output=output / "published")
    assert contents(output / "published") == contents(output / "vae") != contents(encoded)


def test_no_such_vae(encode, real_data, pipe, output, published, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "unet")
    AutoencoderKLMaisi(3, 3, (16, 16), 1, norm_num_groups=8).save_pretrained(tmp_path / "colours")
    for vae, says in (
        (published, "say with --version which published checkpoint it is"),
        (tmp_path / "unet", "holds MaisiUNet3DConditionModel"),
        (tmp_path / "colours", "AutoencoderKLMaisi with in_channels=3, must be AutoencoderKLMaisi with in_channels=1"),
    ):
        assert says in error_of(encode, real_data, vae=vae)
    for options in ([], ["--version", "rflow-ct"]):
        message = error_of(encode, real_data, *options, "--subfolder", "masks", vae=published)
        assert "masks" in message and "give" in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "multiple", "says"),
    [
        (["--size", "32", "32", "30"], None, "--size 32 32 30 is not allowed: the VAE needs positive multiples of 4"),
        (["--size", "32", "0", "32"], None, "--size 32 0 32 is not allowed"),
        ([], 6, "--size_multiple 6 is not allowed: the VAE needs positive multiples of 4"),
        (["--data_root", "/nowhere"], 16, "2 of 2 cases failed"),
    ],
)
def test_wrong_options(encode, real_data, output, options, multiple, says):
    assert says in error_of(encode, real_data, *options, multiple=multiple)
    assert not (output / "latents.json").exists()


def test_no_images(encode, tmp_path, vae):
    (tmp_path / "empty").mkdir()
    assert "has no .nii or .nii.gz file" in error_of(encode, tmp_path / "empty")
    assert "has no .nii or .nii.gz file" in error_of(encode, vae)


# Label maps


@pytest.fixture(scope="module")
def mask_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "mask_vae"
    make_pipeline().mask_vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoded_labels(real_data, mask_vae, tmp_path_factory):
    """What comes of the label maps of the data list; not to be changed."""
    output = tmp_path_factory.mktemp("encoded labels")
    arguments = ["--data_list", real_data / "dataset.json", "--vae", mask_vae, "--output_dir", output]
    command.main([*map(str, arguments), "--size_multiple", "16"])
    return output


@pytest.mark.parametrize("name", PARTS)
def test_latents_of_label_maps(encoded_labels, real_data, mask_vae, name):
    """The posterior of the bits of the nearest labels; the images have no part in it."""
    source = to_ras(load_label_map(real_data / f"{name}_mask.nii.gz"))
    labels = resize_volume(source, SIZES[name], order=0)
    stored = nib.load(encoded_labels / f"{name}_label.nii.gz")
    assert np.array_equal(stored.dataobj, labels.dataobj) and stored.get_data_dtype() == np.uint8
    np.testing.assert_allclose(stored.affine, labels.affine, atol=1e-4)
    assert set(np.unique(stored.dataobj)) <= set(np.unique(source.dataobj))

    data = np.asarray(labels.dataobj)
    bits = torch.from_numpy(np.stack([(data >> i) & 1 for i in range(8)])).float()
    with torch.no_grad():
        posterior = AutoencoderKLMaisi.from_pretrained(mask_vae).encode(bits[None]).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], 1)[0]
    torch.testing.assert_close(load_latent(encoded_labels / f"{name}_emb.nii.gz", 8), expected)


def test_list_of_label_maps(encode, data, output, mask_vae):
    sizes = (0.5, *[-1.0] * 9)
    change(data, organ_size=sizes, image=data / "a" / "gone.nii.gz")
    for _ in range(2):
        encode(data, vae=mask_vae)
    first, second = read_data_list(output / "latents.json").cases
    assert (first.organ_size, second.organ_size) == (sizes, None)
    assert first.image == output / "a/gone_emb.nii.gz" and first.label == output / "a/gone_label.nii.gz"
    assert first.dim == SIZES["a/ct"] and first.modality == "ct_contrast" and (first.fold, second.fold) == (0, 1)


def test_what_the_latents_are_like_is_in_their_list(encode, real_data, output, tmp_path):
    """So that a list of them can be checked without the VAE."""
    settings = {"latent_channels": 6, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    AutoencoderKLMaisi(**settings).save_pretrained(tmp_path / "vae")
    encode(real_data, vae=tmp_path / "vae")
    data_list = read_data_list(output / "latents.json")
    assert (data_list.latent_channels, data_list.spatial_compression_ratio) == (6, 2)
    assert check_cases(data_list) == []


def test_folder_of_label_maps(encode, data, output, mask_vae, encoded_labels):
    (data / "dataset.json").unlink()
    for name in PARTS:
        (data / f"{name}.nii.gz").unlink()
        (data / f"{name}_mask.nii.gz").rename(data / f"{name}.nii.gz")
    encode(data, vae=mask_vae)
    made, expected = contents(output), contents(encoded_labels)
    assert made.keys() == expected.keys()
    assert all(made[name] == expected[name] for name in made if name.endswith(".nii.gz"))


def test_mask_vae_of_a_pipeline(encode, real_data, output, mask_vae, encoded_labels, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "both")
    encode(real_data, "--subfolder", "mask_vae", vae=tmp_path / "both", output=output / "both")
    MaisiMaskPipeline.from_pipe(pipe).save_pretrained(tmp_path / "masks")
    encode(real_data, vae=tmp_path / "masks", output=output / "masks")
    assert contents(output / "both") == contents(output / "masks") == contents(encoded_labels)


def test_cases_without_label_maps(encode, data, output, mask_vae):
    change(data, label=None)
    message = error_of(encode, data, vae=mask_vae)
    assert "encodes label maps, and 1 of the 2 cases have none, that of" in message and "a/ct.nii.gz" in message
    assert not output.exists()


def test_labels_that_the_mask_vae_lacks(encode, data, mask_vae, capsys):
    path = data / "a/ct_mask.nii.gz"
    image = nib.load(path)
    labels = np.asarray(image.dataobj).copy()
    labels[labels == TUMOR] = 131
    nib.Nifti1Image(labels, image.affine).to_filename(path)
    assert "1 of 2 cases failed" in error_of(encode, data, vae=mask_vae)
    assert "has labels [131], which the mask VAE has no output for" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "label maps"])
def test_two_processes_write_the_same_bytes(real_data, vae, mask_vae, output, encoded, encoded_labels, kind):
    """And each of them does a part: the main one has one case of the two."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPTS / "encode_latents.py"),
    ]
    arguments = [
        "--data_list",
        real_data / "dataset.json",
        "--vae",
        vae if kind == "images" else mask_vae,
        "--output_dir",
        output,
        "--size_multiple",
        "16",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "1/1" in run.stderr and "2/2" not in run.stderr
    assert run.stdout.count("wrote") == 1 and "2 latents" in run.stdout
    assert contents(output) == contents(encoded if kind == "images" else encoded_labels)
