import json

import pytest

from maisi_diffusers.anatomy import CONTROLLABLE_ANATOMY, complete_anatomy_size, read_size_conditions

# gallbladder, liver, stomach, pancreas, colon; lung, pancreatic, hepatic, colon, bone tumor
HEALTHY = [0.1, 0.5, 0.2, 0.3, 0.4, -1, -1, -1, -1, -1]
LARGE_LIVER = [0.2, 0.9, 0.3, 0.4, 0.5, -1, -1, -1, -1, -1]
HEPATIC = [0.3, 0.7, 0.4, 0.5, 0.6, -1, -1, 0.2, -1, -1]
LARGE_HEPATIC = [0.4, 0.1, 0.5, 0.6, 0.7, -1, -1, 0.9, -1, -1]
CHEST = [-1, -1, -1, -1, -1, 0.5, -1, -1, -1, -1]
TWO_TUMORS = [0.5, 0.3, 0.6, 0.7, 0.8, -1, 0.3, 0.35, -1, -1]
CONDITIONS = [HEALTHY, LARGE_LIVER, HEPATIC, LARGE_HEPATIC, CHEST, TWO_TUMORS]

# pairs: the nearest case by hand, and what is given instead of its sizes
CASES = {
    "an organ": ([("liver", 0.55)], HEALTHY, {"liver": 0.55}),
    "organs": ([("liver", 0.85), ("colon", 0.7)], LARGE_LIVER, {"liver": 0.85, "colon": 0.7}),
    "a tumor": ([("hepatic tumor", 0.3)], TWO_TUMORS, {"hepatic tumor": 0.3, "pancreatic tumor": -1}),
    "a tumor and an organ": (
        [("liver", 0.8), ("hepatic tumor", 0.3)],
        HEPATIC,
        {"liver": 0.8, "hepatic tumor": 0.3},
    ),
    # 1.2, where the case that has the tumor is 6.4 away.
    "the tumor counts like an organ": (
        [("liver", 0.9), ("lung tumor", 0.2), ("stomach", 0.3), ("pancreas", 0.4), ("colon", 0.5)],
        LARGE_LIVER,
        {"liver": 0.9, "lung tumor": 0.2, "stomach": 0.3, "pancreas": 0.4, "colon": 0.5},
    ),
    "a tumor that no case has": (
        [("bone lesion", 0.5), ("liver", 0.9)],
        LARGE_LIVER,
        {"bone lesion": 0.5, "liver": 0.9},
    ),
    "absence": ([("liver", -1), ("colon", -1)], CHEST, {"lung tumor": -1}),
    "absence of a tumor": ([("liver", 0.7), ("hepatic tumor", -1)], HEALTHY, {"liver": 0.7}),
    "a tumor that was not asked for": ([("liver", 0.71)], HEPATIC, {"liver": 0.71, "hepatic tumor": -1}),
    "the first of equals": ([("gallbladder", 0.25)], LARGE_LIVER, {"gallbladder": 0.25}),
    "nothing": ([], HEALTHY, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_completion(case):
    given, nearest, changed = CASES[case]
    before = [list(row) for row in CONDITIONS]
    expected = [changed.get(name, size) for name, size in zip(CONTROLLABLE_ANATOMY, nearest)]
    assert complete_anatomy_size(given, CONDITIONS) == expected
    assert CONDITIONS == before


def test_reading(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps([{"organ_size": row, "case": "ignored"} for row in CONDITIONS]))
    assert read_size_conditions(path) == CONDITIONS
    assert all(isinstance(size, float) for row in read_size_conditions(path) for size in row)


@pytest.mark.parametrize("row", [HEALTHY[:9], HEALTHY[:9] + [1.5], HEALTHY[:9] + [-0.5], HEALTHY[:9] + ["x"], 5, None])
def test_wrong_sizes(tmp_path, row):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps([{"organ_size": HEALTHY}, {"organ_size": row}, {"size": HEALTHY}, HEALTHY[:3]]))
    with pytest.raises(ValueError, match="3 of 4 entries of .*sizes.json") as error:
        read_size_conditions(path)
    message = str(error.value)
    assert "\n" not in message
    for text in ("entry 1: organ_size", "entry 2: organ_size is None", "entry 3: ", "10 numbers of 0 to 1, or -1"):
        assert text in message


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="sizes.json"):
        read_size_conditions(tmp_path / "sizes.json")
