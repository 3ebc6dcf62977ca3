"""The JSON data list: what is read, what is written, what is refused."""

import json
import os
from pathlib import Path

import pytest

from maisi_diffusers.training.data_list import (
    Case,
    DataList,
    check_new_labels,
    read_data_list,
    split_fold,
    write_data_list,
)

PUBLISHED = {
    "image": "KiTS-00001/x_arterial_emb.nii.gz",
    "label": "KiTS-00001/mask_combined_label.nii.gz",
    "dim": [512, 512, 512],
    "spacing": [1.0, 1.0, 1.0],
    "top_region_index": [0, 1, 0, 0],
    "bottom_region_index": [0, 0, 0, 1],
    "modality": "ct",
    "fold": 3,
}


def write_json(folder, content):
    path = folder / "list.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_published_layout(tmp_path):
    data_list = read_data_list(write_json(tmp_path, {"name": "KiTS", "training": [{**PUBLISHED, "extra": 1}]}))
    assert data_list == DataList(
        [
            Case(
                tmp_path / "KiTS-00001/x_arterial_emb.nii.gz",
                tmp_path / "KiTS-00001/mask_combined_label.nii.gz",
                (512, 512, 512),
                (1.0, 1.0, 1.0),
                (0, 1, 0, 0),
                (0, 0, 0, 1),
                "ct",
                3,
            )
        ]
    )


def test_only_the_image_is_needed(tmp_path):
    assert read_data_list(write_json(tmp_path, {"training": [{"image": "a"}]})).cases == [Case(tmp_path / "a")]


def test_root_in_place_of_the_lists_folder(tmp_path):
    path = write_json(tmp_path, {"training": [PUBLISHED, {**PUBLISHED, "image": "/elsewhere/a.nii.gz"}]})
    cases = read_data_list(path, root="/data").cases
    assert cases[0].image == Path("/data") / PUBLISHED["image"]
    assert cases[0].label == Path("/data") / PUBLISHED["label"]
    assert cases[1].image == Path("/elsewhere/a.nii.gz")


def test_round_trip(tmp_path):
    cases = [
        Case(tmp_path / "ct" / "a.nii.gz", tmp_path / "list" / "labels" / "a.nii.gz", (2, 3, 4), (0.7, 0.7, 1.25)),
        Case(tmp_path / "list" / "b.nii.gz", modality="mri_t1", fold=2),
        Case(tmp_path / "list" / "c.nii.gz", None, None, None, (1, 0, 0, 0), (0, 0, 1, 0)),
        Case(tmp_path / "list" / "d.nii.gz", organ_size=(0.0, 0.25, 1.0, *[-1.0] * 7)),
    ]
    data_list = DataList(cases, {"kidney tumor": 129}, {"kidney tumor": ["left kidney", "right kidney"]}, 24, 8)
    path = tmp_path / "list" / "list.json"
    write_data_list(path, data_list)
    assert read_data_list(path) == data_list

    entries = json.loads(path.read_text())["training"]
    assert entries[0]["image"] == str(tmp_path / "ct" / "a.nii.gz")
    assert entries[0]["label"] == "labels/a.nii.gz", "a list moves together with what lies below it"
    assert "label" not in entries[1] and "dim" not in entries[1]
    assert os.listdir(path.parent) == ["list.json"]


@pytest.mark.parametrize("name", ["latent_channels", "spatial_compression_ratio"])
def test_what_latents_cannot_have(tmp_path, name):
    path = write_json(tmp_path, {"training": [{"image": "a"}], name: "4"})
    with pytest.raises(ValueError, match=f"{name} is '4', must be a whole number"):
        read_data_list(path)


def test_a_list_without_new_classes_has_the_published_keys_alone(tmp_path):
    write_data_list(tmp_path / "list.json", DataList([Case(tmp_path / "a.nii.gz")]))
    assert json.loads((tmp_path / "list.json").read_text()) == {
        "training": [{"image": "a.nii.gz", "modality": "ct", "fold": 0}]
    }


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("a.nii.gz", 'no path called "image"'),
        ({"label": "a"}, 'no path called "image"'),
        ({"image": 3}, 'no path called "image"'),
        ({"label": 3}, '"label" is 3, must be a path'),
        ({"dim": [1, 2]}, r'"dim" is \[1, 2\], must be 3 numbers'),
        ({"dim": [1, 2, 3.5]}, r'"dim" is \[1, 2, 3.5\], must be 3 numbers'),
        ({"dim": [1, 2, 0]}, r'"dim" is \[1, 2, 0\], must be above 0'),
        ({"dim": None}, '"dim" is None, must be 3 numbers'),
        ({"spacing": "1 mm"}, "\"spacing\" is '1 mm', must be 3 numbers"),
        ({"spacing": [1, 1, -1]}, r'"spacing" is \[1, 1, -1\], must be above 0'),
        ({"spacing": [1, 1, float("nan")]}, r'"spacing" is \[1, 1, nan\], must be above 0 and finite'),
        ({"spacing": [1, 1, float("inf")]}, r'"spacing" is \[1, 1, inf\], must be above 0 and finite'),
        ({"top_region_index": [0, 1, 0]}, '"top_region_index" is .*, must be 4 numbers'),
        ({"top_region_index": [0, 1, 1, 0]}, r'"top_region_index" is \[0, 1, 1, 0\], must be three zeros and a 1'),
        ({"bottom_region_index": [0, 0.5, 0, 1]}, '"bottom_region_index" is .*, must be three zeros and a 1'),
        ({"modality": "xray"}, "Modality 'xray' is unknown; use one of"),
        ({"modality": None}, '"modality" is None, must be a name'),
        ({"modality": ["ct"]}, r"\"modality\" is \['ct'\], must be a name"),
        ({"organ_size": [0.5] * 9}, r"organ_size is \[.*, must be 10 numbers of 0 to 1, or -1 for absent"),
        ({"organ_size": [0.5] * 9 + ["-1"]}, r"organ_size is \[.*, must be 10 numbers of 0 to 1, or -1 for absent"),
        ({"organ_size": [0.5] * 9 + [1.5]}, r"organ_size is \[.*, must be 10 numbers of 0 to 1, or -1 for absent"),
        ({"organ_size": [-0.5] * 10}, r"organ_size is \[.*, must be 10 numbers of 0 to 1, or -1 for absent"),
        ({"organ_size": [float("nan")] * 10}, r"organ_size is \[.*, must be 10 numbers of 0 to 1, or -1 for absent"),
        ({"fold": "first"}, "\"fold\" is 'first', must be a whole number"),
    ],
)
def test_broken_entries_are_refused(tmp_path, entry, says):
    if isinstance(entry, dict) and not entry.keys() & {"image", "label"} or entry == {"label": 3}:
        entry = {"image": "a", **entry}
    path = write_json(tmp_path, {"training": [PUBLISHED, entry]})
    with pytest.raises(ValueError, match=f"list.json': entry 1: {says}") as error:
        read_data_list(path)
    assert "\n" not in str(error.value)


def test_all_broken_entries_are_named(tmp_path):
    path = write_json(
        tmp_path, {"training": [{"dim": 1}, PUBLISHED, {"image": "a", "dim": 1}, {"image": "a", "fold": "b"}]}
    )
    with pytest.raises(ValueError, match='entry 0: .*"image"; entry 2: "dim" .*; entry 3: "fold"') as error:
        read_data_list(path)
    assert "entry 1" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no JSON file"),
        ("", "is no JSON file"),
        ([PUBLISHED], 'has no cases: it needs a list called "training"'),
        ({"validation": [PUBLISHED]}, "has no cases"),
        ({"training": []}, "has no cases"),
        ({"training": PUBLISHED}, "has no cases"),
        ({"training": [PUBLISHED], "label_names": {"liver": 129}}, "'liver' already"),
        ({"training": [PUBLISHED], "label_names": {"a": 128}}, "cannot have index 128"),
        ({"training": [PUBLISHED], "label_names": ["a"]}, r"label_names is \['a'\], must hold names and values"),
        ({"training": [PUBLISHED], "tumor_organs": {"a": ["liver"]}}, "'a', which is not among the new classes"),
        ({"training": [PUBLISHED], "tumor_organs": ["a"]}, r"tumor_organs is \['a'\]"),
        (
            {"training": [PUBLISHED], "label_names": {"a": 129}, "tumor_organs": {"a": ["livr"]}},
            "'livr'; use 'liver'",
        ),
    ],
)
def test_what_is_no_data_list_is_refused(tmp_path, content, says):
    path = write_json(tmp_path, content)
    with pytest.raises(ValueError, match=says) as error:
        read_data_list(path)
    assert "list.json" in str(error.value) and "\n" not in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "list.json").write_bytes(b"\x93\xff\x00")
    with pytest.raises(ValueError, match="is no JSON file"):
        read_data_list(tmp_path / "list.json")


def test_a_missing_list_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_dataset"):
        read_data_list(tmp_path / "list.json")


def folds(*numbers):
    return [Case(Path(f"{i}.nii.gz"), fold=fold) for i, fold in enumerate(numbers)]


def test_the_fold_is_for_validation():
    cases = folds(0, 1, 2, 1)
    train, held_out = split_fold(iter(cases), 1)
    assert (train, held_out) == ([cases[0], cases[2]], [cases[1], cases[3]])


@pytest.mark.parametrize("fold", [0, 3])
def test_a_single_fold_is_for_training(fold):
    cases = folds(3, 3)
    assert split_fold(cases, fold) == (cases, [])


def test_a_fold_without_cases_is_refused():
    with pytest.raises(ValueError, match=r"fold 1 has no case in the data list, which has folds \[0, 2\]"):
        split_fold(folds(0, 2), 1)


def test_new_labels():
    check_new_labels({}, {})
    check_new_labels({"kidney tumor": 129, "cyst": 2}, {"kidney tumor": ["left kidney", "right kidney"]})
    check_new_labels({"a": 129, "b": 130}, {"a": ["b"]})  # a tumor in another new class
