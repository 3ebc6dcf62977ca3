import json

import numpy as np
import pytest

from maisi_diffusers.anatomy import BONES, LUNG_LOBES, QUALITY_THRESHOLDS, check_quality, new_vocabulary

# The labels of every organ, written out (the published statistics).
ORGANS = {
    "liver": [1],
    "spleen": [3],
    "pancreas": [4],
    "kidney": [5, 14],
    "lung": [28, 29, 30, 31, 32],
    "brain": [22],
    "bone": [*range(33, 57), *range(63, 98), 120, 122, 127],
}
TYPICAL = {"liver": 60, "spleen": 50, "pancreas": 40, "kidney": 90, "lung": -850, "brain": 35, "bone": 300}


def make_case(hu: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """A CT and its labels in which every organ has a plane, of several labels where it is several."""
    image = np.full((8, 8, 80), -1000, dtype=np.float32)
    labels = np.zeros(image.shape, dtype=np.uint8)
    for i, (organ, value) in enumerate(hu.items()):
        plane = slice(8 * i, 8 * i + 8)
        indices = ORGANS.get(organ, [115])
        labels[:, :, plane] = np.resize(indices, (8, 8, 8))
        image[:, :, plane] = value
        image[0, 0, plane] = 3000  # a few outliers do not move a median
    return image, labels


def test_table():
    assert set(QUALITY_THRESHOLDS) == set(ORGANS)
    assert ORGANS["lung"] == list(LUNG_LOBES) and ORGANS["bone"] == list(BONES)


def test_typical():
    report = check_quality(*make_case(TYPICAL))
    assert report["passed"] and set(report["organs"]) == set(TYPICAL)
    assert report["organs"]["liver"] == {"median": 60.0, "low": -22.0, "high": 162.0, "passed": True}
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("organ", TYPICAL)
def test_outliers(organ):
    low, high = QUALITY_THRESHOLDS[organ]
    for value, passed in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
        report = check_quality(*make_case(TYPICAL | {organ: value}))
        found = report["organs"][organ]
        assert (report["passed"], found["passed"], found["median"]) == (passed, passed, value)
        assert sum(not other["passed"] for other in report["organs"].values()) == (not passed)


@pytest.mark.parametrize("index", [label for labels in ORGANS.values() for label in labels])
def test_every_label(index):
    labels = np.full((2, 2, 2), index, dtype=np.uint8)
    report = check_quality(np.full((2, 2, 2), -5000), labels)
    assert not report["passed"]
    assert list(report["organs"]) == [organ for organ, indices in ORGANS.items() if index in indices]


def test_absent_organs_are_left_out():
    image, labels = make_case({"heart": 40})
    assert check_quality(image, labels) == {"passed": True, "organs": {}}
    assert set(check_quality(*make_case({"liver": 60}))["organs"]) == {"liver"}


def test_own_thresholds():
    image, labels = make_case({"heart": 40, "liver": -500})
    assert check_quality(image, labels, {})["passed"]
    report = check_quality(image, labels, {"heart": [50, 60]})
    assert not report["passed"] and set(report["organs"]) == {"heart"}
    labels[labels == 115] = 129
    report = check_quality(image, labels, {"kidney tumor": [0, 60]}, new_vocabulary({"kidney tumor": 129}))
    assert report["organs"]["kidney tumor"]["median"] == 40.0 and report["passed"]


@pytest.mark.parametrize("limits", [[5], [5, 1], ["a", "b"], 5, "ab", [1, 2, 3], [float("nan"), 1]])
def test_no_range(limits):
    with pytest.raises(ValueError, match="'liver' cannot have range .*; give the lowest and the highest HU"):
        check_quality(*make_case(TYPICAL), {"liver": limits})


def test_unknown_organ_and_shapes():
    image, labels = make_case(TYPICAL)
    with pytest.raises(ValueError, match="livr.*'liver'"):
        check_quality(image, labels, {"livr": [0, 1]})
    with pytest.raises(ValueError, match=r"\(8, 8, 79\).*\(8, 8, 80\); give both on one grid"):
        check_quality(image[..., :-1], labels)
