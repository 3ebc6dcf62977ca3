import numpy as np
import pytest

from maisi_diffusers.anatomy import LABELS, remove_tumors


@pytest.mark.parametrize(
    ("tumor", "organ"),
    [
        ("hepatic tumor", "liver"),
        ("pancreatic tumor", "pancreas"),
        ("colon cancer primaries", "colon"),
        ("left kidney cyst", "left kidney"),
        ("right kidney cyst", "right kidney"),
    ],
)
def test_tumor_of_a_single_organ_becomes_it(tumor, organ):
    labels = np.full((4, 4, 4), LABELS["body"], np.uint8)
    labels[1:3, 1:3, 1:3] = LABELS[tumor]
    healthy = remove_tumors(labels)
    assert healthy.dtype == np.uint8
    assert (healthy[1:3, 1:3, 1:3] == LABELS[organ]).all()
    assert (healthy == LABELS["body"]).sum() == 56
    assert (labels[1:3, 1:3, 1:3] == LABELS[tumor]).all(), "the input must stay as it is"


@pytest.mark.parametrize(("tumor", "organs"), [(23, (28, 32)), (128, (33, 97)), (128, (120, 127))])
def test_tumor_between_organs_takes_the_nearest(tumor, organs):
    labels = np.full((9, 3, 3), 200, np.uint8)
    labels[0], labels[-1] = organs
    labels[2:7] = tumor
    healthy = remove_tumors(labels)
    assert healthy[:, 1, 1].tolist()[:4] == [organs[0], 200, organs[0], organs[0]]
    assert healthy[:, 1, 1].tolist()[5:] == [organs[1], organs[1], 200, organs[1]]
    assert not (healthy == tumor).any()


def test_nearest_is_in_mm():
    labels = np.zeros((7, 7, 7), np.uint8)
    labels[3, 3, 3] = 23
    labels[3, 3, 5] = 28  # 2 voxels of 5 mm
    labels[6, 3, 3] = 30  # 3 voxels of 1 mm
    assert remove_tumors(labels)[3, 3, 3] == 28
    assert remove_tumors(labels, spacing=(1.0, 1.0, 5.0))[3, 3, 3] == 30


def test_matches_exhaustive_search():
    rng = np.random.default_rng(0)
    choices = np.array([0, 1, 23, 28, 29, 30, 31, 32], np.uint8)
    labels = rng.choice(choices, size=(9, 8, 7), p=[0.5, 0.2, 0.2] + [0.02] * 5)
    spacing = np.array([0.8, 0.7, 2.5])
    lobes = np.argwhere((labels >= 28) & (labels <= 32))
    healthy = remove_tumors(labels, tuple(spacing))
    for voxel in np.argwhere(labels == 23):
        distance = np.linalg.norm((lobes - voxel) * spacing, axis=1)
        nearest = lobes[np.isclose(distance, distance.min())]
        assert healthy[tuple(voxel)] in labels[tuple(nearest.T)]
    assert (healthy == labels)[labels != 23].all()


@pytest.mark.parametrize("tumor", [23, 128])
def test_tumor_without_its_organ_becomes_body(tumor):
    labels = np.array([[[1, tumor, 62]]], np.uint8)
    assert remove_tumors(labels).tolist() == [[[1, 200, 62]]]


def test_other_labels_stay():
    labels = np.array([label for label in range(256) if label not in (23, 24, 26, 27, 116, 117, 128)], np.uint8)
    assert (remove_tumors(labels.reshape(1, 1, -1)) == labels).all()
