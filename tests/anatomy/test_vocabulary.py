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
    new_vocabulary,
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
    for view in (labels, np.asfortranarray(labels), labels.transpose(1, 0, 2), labels[:, ::-1], labels.ravel()):
        assert labels_present(view) == (1, 255)


def test_new_classes_take_the_place_of_dummies():
    assert new_vocabulary({}) == LABELS
    vocabulary = new_vocabulary({"kidney tumor": 129, "kidney cyst": 2})
    assert vocabulary.items() - LABELS.items() == {("kidney tumor", 129), ("kidney cyst", 2)}
    assert LABELS.keys() - vocabulary.keys() == {"dummy6", "dummy1"}
    assert label_name(129, vocabulary) == "kidney tumor"
    assert label_name(129) == "dummy6", "the vocabulary itself stays as it is"


def test_every_dummy_is_free():
    vocabulary = new_vocabulary({f"class {index}": index for index in DUMMIES})
    assert sorted(vocabulary.values()) == sorted(LABELS.values())
    assert not [name for name in vocabulary if name.startswith("dummy")]


@pytest.mark.parametrize(
    ("label_names", "message"),
    [
        ({"liver": 129}, "'liver' already, as 1; give the new class another name"),
        ({"dummy6": 129}, "'dummy6' already, as 129"),
        (
            {"kidney tumor": 128},
            r"'kidney tumor' cannot have index 128; the free ones are \[2, 16, 18, 20, 21, 129, 130,",
        ),
        ({"kidney tumor": 200}, "cannot have index 200"),
        ({"kidney tumor": 133}, "cannot have index 133"),
        ({"kidney tumor": 0}, "cannot have index 0"),
        ({"kidney tumor": "129"}, "cannot have index '129'"),
        ({"kidney tumor": True}, "cannot have index True"),
        ({"kidney tumor": None}, "cannot have index None"),
        ({"a": 129, "b": 129}, "'b' has index 129, which another one has too"),
    ],
)
def test_new_classes_that_are_refused(label_names, message):
    with pytest.raises(ValueError, match=message) as error:
        new_vocabulary(label_names)
    assert "\n" not in str(error.value)
