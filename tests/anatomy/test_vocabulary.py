import numpy as np
import pytest

from maisi_diffusers.anatomy import (
    BODY,
    BONES,
    CONTROLLABLE_ANATOMY,
    DUMMIES,
    LABELS,
    LUNG_LOBES,
    MASK_VAE_LABELS,
    TUMORS,
    label_index,
    label_name,
    labels_present,
)


def test_numbers_are_1_to_132_and_body():
    assert list(LABELS.values()) == [*range(1, 133), 200]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *[("liver", 1), ("right kidney", 5), ("left kidney", 14), ("right adrenal gland", 8), ("gallbladder", 10)],
        *[("bladder", 15), ("brain", 22), ("lung tumor", 23), ("pancreatic tumor", 24), ("hepatic tumor", 26)],
        *[("left lung upper lobe", 28), ("right lung upper lobe", 30), ("right lung lower lobe", 32)],
        *[("vertebrae L5", 33), ("vertebrae L1", 37), ("vertebrae T12", 38), ("vertebrae T1", 49)],
        *[("vertebrae C7", 50), ("vertebrae C1", 56), ("trachea", 57), ("right iliac vena", 61), ("colon", 62)],
        *[("left rib 1", 63), ("left rib 12", 74), ("right rib 1", 75), ("right rib 12", 86)],
        *[("left humerus", 87), ("right clavicula", 92), ("left femur", 93), ("right hip", 96), ("sacrum", 97)],
        *[("left iliopsoas", 106), ("left brachiocephalic vein", 110), ("right common carotid artery", 113)],
        *[("heart", 115), ("left kidney cyst", 116), ("right kidney cyst", 117), ("skull", 120), ("sternum", 122)],
        *[("thyroid gland", 126), ("vertebrae S1", 127), ("bone lesion", 128), ("airway", 132), ("body", 200)],
    ],
)
def test_published_numbers(name, number):
    assert label_index(name) == number
    assert label_name(number) == name


def test_groups():
    assert DUMMIES == (2, 16, 18, 20, 21, 129, 130, 131)
    assert all(label_name(lobe).split()[1] == "lung" for lobe in LUNG_LOBES)
    kinds = {label_name(bone).removeprefix("left ").removeprefix("right ").split()[0] for bone in BONES}
    assert kinds == set("vertebrae rib humerus scapula clavicula femur hip sacrum skull sternum".split())
    assert {label_name(t): o for t, o in TUMORS.items() if len(o) == 1} == {
        "pancreatic tumor": (4,),
        "hepatic tumor": (1,),
        "colon cancer primaries": (62,),
    }
    assert TUMORS[23] == LUNG_LOBES and TUMORS[128] == BONES
    assert [LABELS[name] for name in CONTROLLABLE_ANATOMY] == [10, 1, 12, 4, 62, 23, 24, 26, 27, 128]


def test_mask_vae_channels():
    assert len(MASK_VAE_LABELS) == 125
    assert set(range(133)) - set(MASK_VAE_LABELS) == {2, 16, 18, 20, 21, 116, 117, 130, 131}
    assert [MASK_VAE_LABELS[channel] for channel in (0, 1, 2, 122, 123, 124)] == [0, 1, 3, 129, 132, BODY]


def test_label_index_takes_numbers_and_other_vocabularies():
    assert label_index(132) == 132
    assert label_index(np.uint8(200)) == 200
    own = {**LABELS, "kidney tumor": 129}
    assert label_index("kidney tumor", own) == 129
    with pytest.raises(ValueError, match="kidney tumor"):
        label_index("kidney tumor")


@pytest.mark.parametrize(
    ("label", "message"),
    [("livr", "'livr'.*'liver'"), ("Vertebrae l5", "'vertebrae L5'"), ("zzz", "LABELS"), (0, "0"), (133, "133")],
)
def test_unknown_labels_are_refused(label, message):
    with pytest.raises(ValueError, match=message) as error:
        label_index(label)
    assert "\n" not in str(error.value)


def test_labels_present():
    labels = np.zeros((3, 4, 5), np.uint8)
    assert labels_present(labels) == ()
    labels[0, 0, 0], labels[2, 3, 4] = 255, 1
    assert labels_present(labels) == (1, 255)
