"""Colours and legend names of the labels."""

import numpy as np

from maisi_diffusers.anatomy import DUMMIES, LABELS, TUMORS, label_colours, legend_names, new_vocabulary


def test_every_label_has_a_colour():
    colours = label_colours()
    assert colours.shape == (256, 3) and colours.min() >= 0 and colours.max() <= 1
    grey = (colours == 0.5).all(axis=1)
    assert not grey[list(LABELS.values())].any()
    assert grey[1:].sum() == 255 - len(LABELS)


def test_neighbours_differ():
    colours = label_colours()
    for a, b in [("vertebrae L1", "vertebrae L2"), ("vertebrae T12", "vertebrae L1"), ("left rib 3", "left rib 4")]:
        assert np.abs(colours[LABELS[a]] - colours[LABELS[b]]).sum() > 0.2, (a, b)
    organs = [label for label in LABELS.values() if label < 32 and label not in (22, 25)]
    for i, label in enumerate(organs):
        assert (np.abs(colours[organs[:i]] - colours[label]).sum(axis=1) > 0.05).all(), label


def test_legend_names():
    names = legend_names()
    assert set(names) == set(LABELS.values())
    assert names[LABELS["left kidney"]] == names[LABELS["right kidney"]] == "kidney"
    assert names[LABELS["right lung middle lobe"]] == "right lung middle lobe"
    assert names[LABELS["left lung upper lobe"]] == "lung upper lobe"
    assert names[LABELS["left atrial appendage"]] == "left atrial appendage"
    assert {names[label] for label in range(33, 57)} == {"vertebrae"}
    assert {names[label] for label in range(63, 87)} == {"rib"}
    assert list(names)[: len(TUMORS)] == list(TUMORS)
    assert list(names)[-1] == LABELS["body"]


def test_new_classes_come_after_the_tumors():
    names = legend_names(new_vocabulary({"kidney tumor": 129}))
    assert names[129] == "kidney tumor"
    assert set(list(names)[len(TUMORS) : len(TUMORS) + len(DUMMIES)]) == set(DUMMIES)
