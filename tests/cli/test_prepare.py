"""From folders of CTs and segmentations to a data set to train on, and what is said of a broken one."""

import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from accelerate import PartialState

from maisi_diffusers.anatomy import BODY, TOTALSEGMENTATOR_CLASSES
from maisi_diffusers.cli.prepare import main
from maisi_diffusers.training.data_list import Case, DataList, read_data_list, write_data_list
from tests.scripts.training_data import SCRIPTS
from tests.tiny import SIZE, SPACING
from tests.training.volumes import AFFINE, ct_array, in_lps, label_array, save, save_latent, without_body

SCRIPT = SCRIPTS / "prepare_dataset.py"
CASES = ("a", "b", "c")


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """What accelerate learned of this process is forgotten afterwards."""
    yield
    PartialState._reset_state()


@pytest.fixture
def data(tmp_path):
    """Folders of three cases, with a mask of a lesion for one; the first CT is in LPS, as nnU-Net names it."""
    for case in CASES:
        save(tmp_path / "images" / f"{case}.nii.gz", ct_array())
        save(tmp_path / "segmentations" / f"{case}.nii.gz", without_body())
    in_lps(tmp_path / "images" / "a.nii.gz").rename(tmp_path / "images" / "a_0000.nii.gz")
    lesion = np.zeros(SIZE, np.uint8)
    lesion[14:18, 8:12, 16:20] = 1
    save(tmp_path / "lesions" / "b.nii.gz", lesion)
    return tmp_path


def arguments(data, *options, output="out"):
    return [
        *("--images", str(data / "images"), "--labels", str(data / "segmentations"), "--vocabulary", "maisi"),
        *("--output_dir", str(data / output), *map(str, options)),
    ]


def error_of(given):
    """The line that the command ends in."""
    with pytest.raises(SystemExit) as exit_:
        main(given)
    message = exit_.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message.removeprefix("error: ")


def check(path, capsys):
    """Exit code and lines of `--check`."""
    capsys.readouterr()
    code = 0
    try:
        main(["--check", str(path)])
    except SystemExit as exit_:  # with a message, of which Python makes 1
        code = 1 if exit_.code == f"error: {path} has {exit_.code.split()[-2]} problem(s)" else exit_.code
    return code, capsys.readouterr().out.splitlines()


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def labels_of(data, case, output="out"):
    return np.asarray(nib.load(data / output / "labels" / f"{case}.nii.gz").dataobj)


LESION = ("--new_class", "lesion", "129")


def test_what_is_written(data, capsys):
    options = ["--new_class", "lesion", 129, data / "lesions", "--new_class", "cyst", 2, "hepatic tumor"]
    options += ["--class_organs", "lesion", "liver", "--class_organs", "lesion", "stomach", "--num_folds", 2]
    main(arguments(data, *options))
    printed = capsys.readouterr().out
    assert files_of(data / "out").keys() == {
        "dataset.json",
        "prepare.json",
        *(f"labels/{case}.nii.gz" for case in CASES),
    }

    data_list = read_data_list(data / "out" / "dataset.json")
    assert data_list.label_names == {"lesion": 129, "cyst": 2}
    assert data_list.tumor_organs == {"lesion": ["liver", "stomach"]}
    images = [data / "images" / name for name in ("a_0000.nii.gz", "b.nii.gz", "c.nii.gz")]
    assert [case.image for case in data_list.cases] == images
    assert sorted(case.fold for case in data_list.cases) == [0, 0, 1]
    for name, case in zip(CASES, data_list.cases):
        assert case.label == data / "out" / "labels" / f"{name}.nii.gz"
        assert (case.dim, case.spacing, case.modality) == (SIZE, SPACING, "ct")
        assert (case.top_region_index, case.bottom_region_index) == ((0, 1, 0, 0), (0, 0, 0, 1))
        written = nib.load(case.label)
        assert written.get_data_dtype() == np.uint8 and np.allclose(written.affine, AFFINE)

    expected = np.where(label_array() == 26, 2, label_array())
    assert (labels_of(data, "a") == expected).all() and (labels_of(data, "c") == expected).all()
    lesion = np.asarray(nib.load(data / "lesions" / "b.nii.gz").dataobj) > 0
    assert (labels_of(data, "b") == np.where(lesion, 129, expected)).all()

    assert f"wrote {data / 'out' / 'dataset.json'}: 3 cases, checked, nothing wrong" in printed
    assert f"lesion (129): in 1 of 3 cases, median volume {64 * 12 / 1000:.4g} ml" in printed
    assert "cyst (2): in 3 of 3 cases, median volume" in printed
    assert "labels in every case: liver, cyst, left lung upper lobe, left femur, body\n" in printed
    assert "labels in some cases: lesion 1\n" in printed
    assert "cases in each fold: 0: 2, 1: 1\n" in printed
    assert "cases by region: thorax to pelvis-lower: 3\n" in printed


def test_the_real_torso(torso_ct, torso_labels, tmp_path, capsys):
    for folder, source in (("images", torso_ct), ("segmentations", torso_labels)):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "torso.nii.gz")
    in_lps(tmp_path / "images" / "torso.nii.gz")
    given = arguments(tmp_path, "--new_class", "bladder lesion", 129, "urinary_bladder")
    given[given.index("maisi")] = "totalsegmentator"
    main(given)

    (case,) = read_data_list(tmp_path / "out" / "dataset.json").cases
    assert (case.dim, case.spacing) == ((122, 101, 112), (3.0, 3.0, 3.0))
    assert (case.top_region_index, case.bottom_region_index) == ((0, 1, 0, 0), (0, 0, 0, 1))
    raw = np.asarray(nib.load(torso_labels).dataobj)
    bladder = raw == TOTALSEGMENTATOR_CLASSES.index("urinary_bladder") + 1
    found = labels_of(tmp_path, "torso")
    assert ((found == 129) == bladder).all()
    assert (found == BODY).any() and not (found == 15).any()
    assert f"median volume {bladder.sum() * 27 / 1000:.4g} ml" in capsys.readouterr().out
    assert check(tmp_path / "out" / "dataset.json", capsys) == (0, ["1 cases, nothing wrong"])


def test_segmentations_in_folders_of_their_cases(data):
    for case in CASES:
        target = data / "segmentations" / case / "segmentation.nii.gz"
        target.parent.mkdir()
        (data / "segmentations" / f"{case}.nii.gz").rename(target)
    main(arguments(data))
    assert all((labels_of(data, case) == label_array()).all() for case in CASES)


def test_one_bad_case_stops_no_other(data, capsys):
    (data / "images" / "b.nii.gz").write_bytes((data / "images" / "b.nii.gz").read_bytes()[:-40])
    (data / "segmentations" / "c.nii.gz").unlink()
    save(data / "images" / "d.nii.gz", ct_array())
    save(data / "segmentations" / "d.nii.gz", without_body()[:, :, 0])
    image = nib.Nifti1Image(ct_array(), AFFINE)
    raw = bytearray(image.to_bytes())
    raw[42:48] = np.full(3, 30_000, "<i2").tobytes()  # voxels along each axis
    (data / "images" / "e.nii").write_bytes(raw)
    save(data / "segmentations" / "e.nii.gz", without_body())
    assert error_of(arguments(data)) == "4 of 5 cases failed and are not in the list: b, c, d, e"
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"b: '{data / 'images' / 'b.nii.gz'}' is damaged or cut short") for line in lines)
    assert any(line.startswith(f"c: no segmentation of this name in {data / 'segmentations'}") for line in lines)
    assert any(line.startswith("d: ") and "shape (24, 16), must be one volume" in line for line in lines)
    assert any(line.startswith("e: ") for line in lines)
    assert [case.image.name for case in read_data_list(data / "out" / "dataset.json").cases] == ["a_0000.nii.gz"]
    assert files_of(data / "out").keys() == {"dataset.json", "prepare.json", "labels/a.nii.gz"}


def test_all_cases_bad(data):
    for case in CASES:
        (data / "segmentations" / f"{case}.nii.gz").write_text("no image")
    assert error_of(arguments(data)).startswith("3 of 3 cases failed")
    assert not (data / "out" / "dataset.json").exists()


@pytest.mark.parametrize("missing", [False, True])
def test_a_case_that_is_mended_keeps_the_others_folds(data, missing):
    main(arguments(data))
    expected = files_of(data / "out")
    segmentation = data / "segmentations" / "b.nii.gz"
    good = segmentation.read_bytes()
    segmentation.unlink() if missing else segmentation.write_bytes(good[:-40])
    error_of(arguments(data, output="mended"))
    folds = [case.fold for case in read_data_list(data / "out" / "dataset.json").cases]
    assert [case.fold for case in read_data_list(data / "mended" / "dataset.json").cases] == [folds[0], folds[2]]
    segmentation.write_bytes(good)
    main(arguments(data, output="mended"))
    assert files_of(data / "mended") == expected


def test_warnings_are_said_of_their_case(data, capsys):
    save(data / "images" / "b.nii.gz", np.full(SIZE, 40, np.int16))
    main(arguments(data))
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1 and warned[0].startswith("b: warning: The CT has no air")


def test_files_without_an_image_are_named(data, capsys):
    save(data / "segmentations" / "z.nii.gz", without_body())
    save(data / "lesions" / "y_mask.nii.gz", label_array())
    main(arguments(data, *LESION, data / "lesions"))
    lines = capsys.readouterr().err.splitlines()
    assert "--labels: warning: no image of z, left out" in lines
    assert "--new_class 'lesion': warning: no image of y_mask, left out" in lines


@pytest.fixture
def muscle_alone(data):
    """The segmentation of a case has nothing that tells a region."""
    labels = np.zeros(SIZE, np.uint8)
    labels[8:12, 6:10, 8:20] = 98  # gluteus maximus
    save(data / "segmentations" / "b.nii.gz", labels)


def test_regions_that_no_label_tells(data, muscle_alone, capsys):
    assert error_of(arguments(data)) == "1 of 3 cases failed and are not in the list: b"
    assert "b: None of the labels [98, 200] tells the body region" in capsys.readouterr().err
    main(arguments(data, "--body_region", "abdomen", "pelvis"))
    regions = [
        (case.top_region_index, case.bottom_region_index)
        for case in read_data_list(data / "out" / "dataset.json").cases
    ]
    assert regions == [((0, 1, 0, 0), (0, 0, 0, 1)), ((0, 0, 1, 0), (0, 0, 0, 1)), ((0, 1, 0, 0), (0, 0, 0, 1))]


def test_a_new_class_tells_no_region(data):
    """Label 2 was an abdominal organ to the published models."""
    labels = np.where(without_body() == 28, 28, 0).astype(np.uint8)
    for case in CASES:
        save(data / "segmentations" / f"{case}.nii.gz", labels)
    main(arguments(data, "--new_class", "lung cyst", 2, data / "lesions"))
    cases = read_data_list(data / "out" / "dataset.json").cases
    assert {case.bottom_region_index for case in cases} == {(0, 1, 0, 0)}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "labels").iterdir()}


def test_running_again_keeps_what_is_there(data):
    main(arguments(data))
    before, bytes_before = times(data / "out"), files_of(data / "out")
    main(arguments(data))
    assert times(data / "out") == before and files_of(data / "out") == bytes_before
    (data / "out" / "labels" / "b.nii.gz").unlink()
    main(arguments(data))
    after = times(data / "out")
    assert after.pop("b.nii.gz") > before.pop("b.nii.gz") and after == before
    assert files_of(data / "out") == bytes_before


def test_the_list_is_made_anew_from_the_same_label_maps(data):
    main(arguments(data))
    before = times(data / "out")
    main(arguments(data, "--num_folds", 1))
    assert times(data / "out") == before
    assert {case.fold for case in read_data_list(data / "out" / "dataset.json").cases} == {0}


def test_label_maps_of_changed_files_are_made_again(data):
    given = arguments(data, *LESION, data / "lesions")
    main(given)
    before = times(data / "out")
    newer = {case: max(before.values()) for case in ("a", "b")}
    save(data / "segmentations" / "a.nii.gz", np.where(without_body() == 26, 1, without_body()))
    os.utime(data / "segmentations" / "a.nii.gz", ns=(newer["a"] + 10**9,) * 2)
    shutil.copy2(data / "lesions" / "b.nii.gz", data / "lesions" / "c.nii.gz")  # an old file that was not there
    main(given)
    after = times(data / "out")
    assert [name for name in sorted(after) if after[name] != before[name]] == ["a.nii.gz", "c.nii.gz"]
    assert not (labels_of(data, "a") == 26).any() and (labels_of(data, "c") == 129).any()


def test_other_settings_are_refused(data):
    main(arguments(data, *LESION, data / "lesions"))
    before = files_of(data / "out")
    record = json.loads(before["prepare.json"])
    assert record["new_class"] == [["lesion", "129", str(data / "lesions")]]
    message = error_of(arguments(data, *LESION, "hepatic tumor"))
    assert (
        f"{data / 'out'} has label maps made with new_class=[['lesion', '129', '{data / 'lesions'}']], not " in message
    )
    assert "[['lesion', '129', 'hepatic tumor']]" in message
    assert message.endswith("--overwrite them, or choose another --output_dir")
    shutil.copytree(data / "segmentations", data / "others")
    assert "made with labels=" in error_of([*arguments(data), "--labels", str(data / "others")])
    assert "made with modality='ct', not 'mri_t1'" in error_of(arguments(data, "--modality", "mri_t1"))
    assert files_of(data / "out") == before

    main(arguments(data, *LESION, "hepatic tumor", "--overwrite"))
    assert (labels_of(data, "a") == 129).any() and not (labels_of(data, "a") == 26).any()


def test_overwriting_that_was_interrupted_goes_on(data):
    """No label map of the settings before is taken for one of these."""
    main(arguments(data))
    old = (data / "out" / "labels" / "c.nii.gz").read_bytes()
    main(arguments(data, *LESION, "hepatic tumor", "--overwrite"))
    expected = files_of(data / "out")
    (data / "out" / "labels" / "c.nii.gz").write_bytes(old)
    main(arguments(data, *LESION, "hepatic tumor"))
    assert files_of(data / "out") == expected


def test_overwriting_makes_all_again(data):
    main(arguments(data))
    before, bytes_before = times(data / "out"), files_of(data / "out")
    main(arguments(data, "--overwrite"))
    assert all(after > before[name] for name, after in times(data / "out").items())
    assert files_of(data / "out") == bytes_before


def remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


BAD = {
    "no images": (lambda d: shutil.rmtree(d / "images"), [], "No folder '{data}/images'"),
    "no segmentations": (lambda d: shutil.rmtree(d / "segmentations"), [], "No folder '{data}/segmentations'"),
    "empty folder": (lambda d: remove_all(d / "images"), [], "'{data}/images' has no .nii or .nii.gz file"),
    "no pairs": (
        lambda d: (remove_all(d / "segmentations"), save(d / "segmentations" / "a_seg.nii.gz", without_body())),
        [],
        "--images and --labels have no case in common, the first are 'a' and 'a_seg': rename the segmentations",
    ),
    "two of a case": (
        lambda d: save(d / "images" / "a.nii.gz", ct_array()),
        [],
        "'{data}/images/a.nii.gz' and '{data}/images/a_0000.nii.gz' are both of case 'a'",
    ),
    "modality": (None, ["--modality", "xray"], "Modality 'xray' is unknown; use one of unknown, ct, "),
    "body region": (None, ["--body_region", "abdomen", "leg"], "body_region 'leg' is unknown; use one of head, "),
    "negative folds": (None, ["--num_folds", "-1"], "num_folds is -1, must be 1 or more"),
    "no folds": (None, ["--num_folds", "0"], "num_folds is 0, must be 1 or more"),
    "index taken": (
        None,
        ["--new_class", "x", "128", "15"],
        "New class 'x' cannot have index 128; the free ones are [2,",
    ),
    "index no number": (None, ["--new_class", "x", "new", "15"], "New class 'x' cannot have index 'new'"),
    "name known": (None, ["--new_class", "liver", "129", "15"], "The vocabulary has 'liver' already, as 1"),
    "name twice": (
        None,
        ["--new_class", "x", "129", "15", "--new_class", "x", "130", "1"],
        "--new_class 'x' is given 2 times: give it once",
    ),
    "index twice": (
        None,
        ["--new_class", "x", "129", "15", "--new_class", "y", "129", "1"],
        "New class 'y' has index 129, which another one has too",
    ),
    "source twice": (
        None,
        ["--new_class", "x", "129", "15", "--new_class", "y", "130", "bladder"],
        "--new_class: 2 classes take all of 'bladder': give it to one",
    ),
    "source missing": (
        None,
        ["--new_class", "x", "129", "masks"],
        "Source 'masks' of new class 'x' is neither a folder nor a label of maisi",
    ),
    "source without cases": (
        lambda d: (remove_all(d / "lesions"), save(d / "lesions" / "a_mask.nii.gz", ct_array())),
        ["--new_class", "x", "129", "{data}/lesions"],
        "--new_class 'x': no mask has the name of a case, the first are 'a_mask' and 'a': rename the masks",
    ),
    "organs of no class": (
        None,
        ["--class_organs", "x", "liver"],
        "tumor_organs names 'x', which is not among the new classes []",
    ),
    "organ unknown": (
        None,
        ["--new_class", "x", "129", "15", "--class_organs", "x", "urinary_bladder"],
        "No anatomy is called 'urinary_bladder'",
    ),
    "no organs": (
        None,
        ["--new_class", "x", "129", "15", "--class_organs", "x"],
        "--class_organs 'x' names no organ: give those that it sits in, or leave it out",
    ),
    "output over the segmentations": (
        lambda d: (d / "segmentations").rename(d / "labels"),
        ["--labels", "{data}/labels", "--output_dir", "{data}", "--overwrite"],
        "{data}/labels is where label maps are to be written: choose another --output_dir",
    ),
    "output over the masks": (
        lambda d: (d / "lesions").rename(d / "labels"),
        ["--new_class", "x", "129", "{data}/labels", "--output_dir", "{data}"],
        "{data}/labels is where label maps are to be written: choose another --output_dir",
    ),
    "others' files in the output": (
        lambda d: save(d / "out" / "labels" / "a.nii.gz", without_body()),
        ["--overwrite"],
        "{data}/out/labels has files that this script did not write: choose another --output_dir",
    ),
    "nnU-Net's dataset.json in the output": (
        lambda d: (d / "dataset.json").write_text('{"channel_names": {"0": "CT"}}'),
        ["--output_dir", "{data}", "--overwrite"],
        "{data}/dataset.json is a file that this script did not write: choose another --output_dir",
    ),
}


@pytest.mark.parametrize(("change", "options", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(data, change, options, says):
    if change is not None:
        change(data)
    before = files_of(data)
    message = error_of(arguments(data, *(option.format(data=data) for option in options)))
    assert message.startswith(says.replace("{data}", str(data)))
    assert files_of(data) == before, "nothing is written"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vocabulary", "snomed"], "invalid choice: 'snomed' (choose from"),
        (["--new_class", "x", "129"], "argument --new_class: expected 3 arguments"),
        (["--num_folds", "many"], "argument --num_folds: invalid int value"),
    ],
)
def test_bad_options_are_refused(data, options, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments(data, *options))
    assert exit_.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--images", "--labels", "--vocabulary", "--output_dir"])
def test_what_is_needed(data, name, capsys):
    given = arguments(data)
    place = given.index(name)
    with pytest.raises(SystemExit) as exit_:
        main(given[:place] + given[place + 2 :])
    assert exit_.value.code == 2
    assert f"argument {name} is required, unless --check is given" in capsys.readouterr().err


def test_all_that_is_wrong_with_a_list_is_said_at_once(tmp_path, capsys):
    ct, labels = save(tmp_path / "ct.nii.gz", ct_array()), save(tmp_path / "labels.nii.gz", label_array())
    latent = save_latent(tmp_path / "latent.nii.gz")
    good = Case(ct, labels, SIZE, SPACING, (0, 1, 0, 0), (0, 0, 0, 1))
    no_body = save(tmp_path / "no_body.nii.gz", without_body())
    small = save(tmp_path / "small.nii.gz", label_array()[:20])
    far = save(tmp_path / "far.nii.gz", label_array(), AFFINE @ nib.affines.from_matvec(np.eye(3), [9, 0, 0]))
    floating = save(tmp_path / "floating.nii.gz", label_array().astype(np.float32))
    path = tmp_path / "list.json"
    write_data_list(path, DataList([good, Case(latent, labels, SIZE, SPACING)]))
    assert check(path, capsys) == (0, ["2 cases, nothing wrong"])

    entries = json.loads(path.read_text())["training"][:1]
    for change in [
        {"image": "gone.nii.gz"},
        {"label": "gone.nii.gz"},
        {"image": "list.json"},
        {"label": small.name},
        {"label": far.name},
        {"label": no_body.name},
        {"label": floating.name},
        {"dim": [1, 2, 3]},
        {"spacing": [1.0, 1.0, 1.0]},
        {"top_region_index": [1, 0, 0, 0]},
        {"dim": [1, 2]},
        {"modality": "xray"},
    ]:
        entries.append({**entries[0], **change})
    path.write_text(json.dumps({"training": entries}))
    code, lines = check(path, capsys)
    assert code == 1
    repeated = [line for line in lines if "is entry 0's too" in line]
    assert [line.split(":")[0] for line in repeated] == [f"entry {i}" for i in (2, 4, 5, 6, 7, 8, 9, 10)]
    rest = [line for line in lines if line not in repeated]
    says = [
        "image '{}/gone.nii.gz' does not exist",
        "label map '{}/gone.nii.gz' does not exist",
        "image '{}/list.json' cannot be read as NIfTI",
        "label map '{}/small.nii.gz' has (20, 16, 32) voxels in RAS+, must have (24, 16, 32)",
        "label map '{}/far.nii.gz' has another field of view than '{}/ct.nii.gz'",
        "label map '{}/no_body.nii.gz' has no body label (200)",
        "label map '{}/floating.nii.gz' holds floating-point labels",
        '"dim" is (1, 2, 3), but image',
        '"spacing" is (1.0, 1.0, 1.0), but image',
        '"top_region_index" is (1, 0, 0, 0) (head-neck), but the labels',
        '"dim" is [1, 2], must be 3 numbers',
        "Modality 'xray' is unknown",
    ]
    assert len(rest) == len(says)
    for i, (line, beginning) in enumerate(zip(rest, says), start=1):
        assert line.startswith(f"entry {i}: {beginning.replace('{}', str(tmp_path))}")


def test_a_list_that_is_none(tmp_path):
    assert error_of(["--check", str(tmp_path / "list.json")]).startswith("data list '")
    (tmp_path / "list.json").write_text("{}")
    assert "has no cases" in error_of(["--check", str(tmp_path / "list.json")])


def run(launcher, given):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, str(SCRIPT), *given], capture_output=True, text=True, env=environment)


# Accelerate's --cpu starts one process; --main_process_port 0 takes any free port.
TWO_PROCESSES = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def test_two_processes_write_the_same_bytes(data):
    """And failures of either are told."""
    (data / "segmentations" / "b.nii.gz").write_text("no image")
    failed = "error: 1 of 3 cases failed and are not in the list: b"
    assert f"error: {error_of(arguments(data, *LESION, data / 'lesions'))}" == failed
    done = run(TWO_PROCESSES, arguments(data, *LESION, data / "lesions", output="two"))
    assert done.returncode == 1 and failed in done.stderr.splitlines()
    assert done.stderr.count(f"b: '{data / 'segmentations' / 'b.nii.gz'}' cannot be read as NIfTI") == 1
    assert sum(line.startswith("wrote ") for line in done.stdout.splitlines()) == 1
    assert files_of(data / "two") == files_of(data / "out")


def told_to_a_program(given, capsys):
    """Exit code, and the object that is all there is on stdout."""
    capsys.readouterr()
    code = 0
    try:
        main([*given, "--json"])
    except SystemExit as exit_:
        code = exit_.code
    return code, json.loads(capsys.readouterr().out)


def test_for_programs(data, capsys):
    path = data / "out" / "dataset.json"
    told = {"data_list": str(path), "cases": 3, "failed": []}
    assert told_to_a_program(arguments(data), capsys) == (0, told)
    check_it = ["--check", str(path)]
    assert told_to_a_program(check_it, capsys) == (0, {"data_list": str(path), "cases": 3, "problems": []})

    (data / "out" / "labels" / "b.nii.gz").unlink()
    code, told = told_to_a_program(check_it, capsys)
    assert code == told["exit_code"] == 1 and told["error"] == f"{path} has 1 problem(s)"
    assert len(told["problems"]) == 1 and "label map" in told["problems"][0]
    (data / "segmentations" / "b.nii.gz").write_text("no image")
    code, told = told_to_a_program(arguments(data), capsys)
    assert code == told["exit_code"] == 1 and (told["cases"], told["failed"]) == (3, ["b"])
    for name in "ac":
        (data / "segmentations" / f"{name}.nii.gz").write_text("no image")
    path.unlink()
    _, told = told_to_a_program(arguments(data), capsys)
    assert told["data_list"] is None and told["failed"] == ["a", "b", "c"] and not path.exists()

    code, told = told_to_a_program(["--check", str(data / "no.json")], capsys)
    assert code == 1 and told.keys() == {"error", "exit_code"} and "no.json" in told["error"]
    code, told = told_to_a_program([], capsys)
    assert code == 2 and told == {"error": "argument --images is required, unless --check is given", "exit_code": 2}


def test_as_a_command(data):
    done = run([sys.executable], arguments(data))
    assert done.returncode == 0 and done.stdout.startswith(f"wrote {data / 'out' / 'dataset.json'}: 3 cases")
    (data / "out" / "labels" / "b.nii.gz").unlink()
    again = run([sys.executable], ["--check", str(data / "out" / "dataset.json")])
    label = data / "out" / "labels" / "b.nii.gz"
    assert again.returncode == 1
    assert again.stdout == f"entry 1: label map '{label}' does not exist: correct its path, or make it again\n"
