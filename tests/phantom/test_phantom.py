"""Anatomy of phantoms: what is there, where, how large, and the same for the same seed."""

import cc3d
import numpy as np
import pytest
from nibabel.orientations import aff2axcodes

from maisi_diffusers.anatomy import (
    BODY,
    BONES,
    LABELS,
    LUNG_LOBES,
    TUMORS,
    labels_present,
    regions_from_labels,
)
from maisi_diffusers.phantom import Subject, make_phantom, names_of_tumors

GRID = {"size": (64, 64, 64), "spacing": (6.0, 6.0, 6.0)}


def arrays(phantom):
    return np.asarray(phantom.image.dataobj), np.asarray(phantom.labels.dataobj)


@pytest.fixture(scope="module")
def torso():
    return make_phantom(3, ["chest", "abdomen"], size=(96, 96, 128), spacing=(4.0, 4.0, 4.0))


def test_grid_and_kind(torso):
    image, labels = torso.image, torso.labels
    assert image.shape == labels.shape == (96, 96, 128)
    assert aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(image.affine, labels.affine)
    np.testing.assert_allclose(image.header.get_zooms(), 4.0)
    assert image.get_data_dtype() == np.int16 and labels.get_data_dtype() == np.uint8
    assert b"synthetic" in bytes(image.header["descrip"]).lower()


def test_every_label_is_of_the_vocabulary_and_there_are_over_60(torso):
    present = labels_present(arrays(torso)[1])
    assert set(present) <= set(LABELS.values())
    assert len(present) > 60
    wanted = [*LUNG_LOBES, *(LABELS[name] for name in ("heart", "aorta", "liver", "spleen", "pancreas", "stomach"))]
    wanted += [LABELS[name] for name in ("left kidney", "right kidney", "colon", "small bowel", "trachea", "sternum")]
    assert set(wanted) <= set(present)
    assert {LABELS[f"vertebrae T{i}"] for i in range(1, 13)} <= set(present)
    assert {LABELS[f"left rib {i}"] for i in range(1, 13)} <= set(present)


def test_all_regions_together_have_what_a_body_has():
    present = set()
    for region in ("head", "chest", "abdomen", "pelvis"):
        for seed in (0, 1):
            present |= set(labels_present(arrays(make_phantom(seed, [region], **GRID))[1]))
    tumors_and_parts = {*TUMORS, LABELS["hepatic vessel"], LABELS["left kidney cyst"], LABELS["right kidney cyst"]}
    free = {LABELS[f"dummy{i}"] for i in range(1, 9)}
    missing = set(LABELS.values()) - present - tumors_and_parts - free
    # At 6 mm a gland of 4 mm may fall between the voxels.
    assert missing <= {LABELS["right adrenal gland"], LABELS["left adrenal gland"]}


@pytest.mark.parametrize("region, markers", [
    ("head", {LABELS["brain"], LABELS["skull"]}),
    ("chest", set(LUNG_LOBES)),
    ("abdomen", {LABELS["liver"], LABELS["spleen"], LABELS["left kidney"]}),
    ("pelvis", {LABELS["left femur"], LABELS["right femur"], LABELS["bladder"]}),
])  # fmt: skip
def test_region_is_in_the_middle(region, markers):
    labels = arrays(make_phantom(5, [region], **GRID))[1]
    heights = np.argwhere(np.isin(labels, list(markers)))[:, 2]
    assert markers <= set(labels_present(labels))
    assert 0.25 < heights.mean() / labels.shape[2] < 0.75


def test_regions_are_read_off_the_labels():
    labels = arrays(make_phantom(2, ["abdomen"], **GRID))[1]
    top, bottom = regions_from_labels(labels_present(labels))
    assert top <= 2 <= bottom


def centre(labels, name):
    return np.argwhere(labels == LABELS[name]).mean(axis=0)


def test_organs_are_where_they_belong(torso):
    labels = arrays(torso)[1]
    x, y, z = range(3)
    assert centre(labels, "liver")[x] > centre(labels, "spleen")[x]  # X grows to the right
    assert centre(labels, "right kidney")[x] > centre(labels, "left kidney")[x]
    assert centre(labels, "sternum")[y] > centre(labels, "vertebrae T6")[y]  # Y to the front
    assert centre(labels, "heart")[z] > centre(labels, "liver")[z]  # Z upwards
    assert centre(labels, "right lung upper lobe")[z] > centre(labels, "right lung lower lobe")[z]
    assert centre(labels, "heart")[x] < centre(labels, "vertebrae T6")[x]
    assert centre(labels, "aorta")[x] < centre(labels, "inferior vena cava")[x]
    assert centre(labels, "stomach")[x] < centre(labels, "gallbladder")[x]
    spine = [f"vertebrae L{i}" for i in range(5, 0, -1)] + [f"vertebrae T{i}" for i in range(12, 0, -1)]
    heights = [centre(labels, name)[z] for name in spine if (labels == LABELS[name]).any()]
    assert heights == sorted(heights) and len(heights) > 12


def test_organs_are_in_one_piece(torso):
    labels = arrays(torso)[1]
    for name in ("liver", "spleen", "heart", "left kidney", "right kidney", "aorta", "stomach", "vertebrae T10"):
        pieces = cc3d.statistics(cc3d.connected_components((labels == LABELS[name]).astype(np.uint8)))["voxel_counts"]
        assert max(pieces[1:]) > 0.9 * sum(pieces[1:]), name


def test_no_organ_leaves_the_body(torso):
    """Skin is around every organ: no voxel of one touches the air outside, but at the edges of the field of view."""
    labels = arrays(torso)[1]
    organ = (labels > 0) & (labels != BODY)
    air = labels == 0
    for axis in (0, 1):
        for step in (1, -1):
            beside = np.roll(air, step, axis)
            edge = [slice(None)] * 3
            edge[axis] = slice(1, -1)
            assert not (organ & beside)[tuple(edge)].any()


def test_same_seed_same_bytes_another_seed_another_body():
    first, again, other = (make_phantom(seed, ["abdomen"], **GRID) for seed in (7, 7, 8))
    for a, b in zip(arrays(first), arrays(again)):
        np.testing.assert_array_equal(a, b)
    assert (arrays(first)[1] != arrays(other)[1]).mean() > 0.05


def test_same_anatomy_on_another_grid():
    """A seed is a person: a finer grid shows the same organs in the same places."""
    coarse = arrays(make_phantom(4, ["abdomen"], size=(48, 48, 48), spacing=(8.0, 8.0, 8.0)))[1]
    fine = arrays(make_phantom(4, ["abdomen"], size=(96, 96, 96), spacing=(4.0, 4.0, 4.0)))[1]
    for name in ("liver", "spleen", "stomach", "colon"):
        volumes = [(labels == LABELS[name]).sum() * mm**3 for labels, mm in ((coarse, 8.0), (fine, 4.0))]
        assert 0.85 < volumes[0] / volumes[1] < 1.18, name
        middles = [(centre(labels, name) + 0.5) * mm for labels, mm in ((coarse, 8.0), (fine, 4.0))]
        assert np.abs(middles[0] - middles[1]).max() < 6.0, name


def test_anisotropic_grid():
    image, labels = arrays(make_phantom(1, ["chest"], size=(64, 64, 32), spacing=(6.0, 6.0, 12.0)))
    assert image.shape == labels.shape == (64, 64, 32)
    assert LABELS["heart"] in labels_present(labels)


def test_hu_of_tissues(torso):
    image, labels = arrays(torso)
    assert image[labels == 0].mean() == pytest.approx(-1000, abs=25)
    lung = np.isin(labels, LUNG_LOBES)
    assert -900 < np.median(image[lung]) < -750
    assert -10 < np.median(image[labels == LABELS["liver"]]) < 150
    bone = np.isin(labels, BONES)
    assert 180 < np.median(image[bone]) < 450


def test_contrast_makes_vessels_bright():
    medians = []
    for phase in ("none", "venous", "arterial"):
        subject = Subject.draw(11, phase=phase)
        image, labels = arrays(make_phantom(11, ["abdomen"], subject=subject, **GRID))
        medians.append(np.median(image[labels == LABELS["aorta"]]))
    assert medians[0] < 60 < 100 < medians[1] < medians[2]


def test_given_volume_of_an_organ():
    volumes = []
    for factor in (0.6, 1.0, 1.6):
        subject = Subject.draw(6, sizes={"spleen": factor})
        volumes.append((arrays(make_phantom(6, ["abdomen"], subject=subject, **GRID))[1] == LABELS["spleen"]).sum())
    assert volumes[0] < 0.75 * volumes[1] and volumes[2] > 1.25 * volumes[1]


def test_sexes_differ():
    male, female = (
        set(labels_present(arrays(make_phantom(9, ["pelvis"], subject=Subject.draw(9, sex=sex), **GRID))[1]))
        for sex in ("male", "female")
    )
    assert LABELS["prostate"] in male - female


@pytest.mark.parametrize("name", names_of_tumors())
def test_tumor_is_in_its_organ_and_as_large_as_asked(name):
    plain = arrays(make_phantom(12, ["chest", "abdomen"], size=(96, 96, 96), spacing=(4.0, 4.0, 4.0)))[1]
    volumes = []
    for diameter in (16.0, 28.0):
        phantom = make_phantom(
            12, ["chest", "abdomen"], (96, 96, 96), (4.0, 4.0, 4.0), tumor=name, tumor_diameter=diameter
        )
        labels = arrays(phantom)[1]
        tumor = labels == LABELS[name]
        assert set(np.unique(plain[tumor])) <= set(TUMORS[LABELS[name]])
        np.testing.assert_array_equal(labels[~tumor], plain[~tumor])
        volumes.append(tumor.sum() * 64.0)
    assert volumes[0] < volumes[1]
    assert volumes[0] < 1.4 * np.pi / 6 * 16**3
    for volume, diameter in zip(volumes, (16, 28)):  # what does not fit into the organ is left out
        assert volume > 0.6 * np.pi / 6 * diameter**3


def test_hepatic_tumor_is_darker_than_the_liver():
    image, labels = arrays(make_phantom(13, ["abdomen"], tumor="hepatic tumor", tumor_diameter=45.0, **GRID))
    medians = [np.median(image[labels == LABELS[name]]) for name in ("hepatic tumor", "liver")]
    assert medians[0] < medians[1] - 8


def test_table_lies_under_the_patient():
    with_table, without = (arrays(make_phantom(1, ["abdomen"], table=table, **GRID)) for table in (True, False))
    np.testing.assert_array_equal(with_table[1], without[1])
    changed = np.argwhere(with_table[0] - without[0].astype(int) > 80)
    assert len(changed) and changed[:, 1].max() < np.argwhere(without[1] > 0)[:, 1].mean()


@pytest.mark.parametrize("given, message", [
    ({"body_region": ["knee"]}, "body_region 'knee' is unknown"),
    ({"size": (64, 64)}, r"size=\(64, 64\) is not allowed: give three numbers above 0"),
    ({"spacing": (3.0, 0.0, 3.0)}, r"spacing=\(3.0, 0.0, 3.0\) is not allowed"),
    ({"tumor": "brain tumor"}, "tumor='brain tumor' is unknown: use one of lung tumor"),
    ({"tumor": "hepatic tumor", "body_region": ["head"]}, "no organ for a hepatic tumor in this field of view"),
    ({"tumor": "hepatic tumor", "tumor_diameter": -1.0}, "tumor_diameter=-1.0 is not allowed: give mm above 0"),
])  # fmt: skip
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(0, **{"size": (48, 48, 48), "spacing": (8.0, 8.0, 8.0)} | given)


@pytest.mark.parametrize("given, message", [
    ({"sex": "other"}, "sex='other' is unknown: use female or male"),
    ({"phase": "late"}, "phase='late' is unknown: use none, arterial or venous"),
    ({"arms": "crossed"}, "arms='crossed' is unknown: use up or down"),
])  # fmt: skip
def test_bad_subject(given, message):
    with pytest.raises(ValueError, match=message):
        Subject.draw(0, **given)


@pytest.mark.parametrize("sizes", [{"Liver": 1.3}, {"brain": 1.3}, {"liver": 0}, {"liver": -1.0}])
def test_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match="give a factor above 0 for any of aorta, bladder"):
        Subject.draw(3, sizes=sizes)


def test_a_subject_has_its_own_seed():
    with pytest.raises(ValueError, match="seed=7 is not that of the subject, 11"):
        make_phantom(7, subject=Subject.draw(11), **GRID)
