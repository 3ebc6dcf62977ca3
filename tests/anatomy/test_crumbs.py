"""Pieces of a label map that are no anatomy."""

import numpy as np
import pytest

from maisi_diffusers.anatomy import LABELS, remove_crumbs
from maisi_diffusers.phantom import make_phantom

LIVER, SPLEEN, BODY = LABELS["liver"], LABELS["spleen"], 200


@pytest.fixture
def labels():
    """Liver beside spleen, in a body."""
    labels = np.zeros((20, 20, 20), dtype=np.uint8)
    labels[1:-1, 1:-1, 1:-1] = BODY
    labels[4:10, 4:16, 4:16] = LIVER
    labels[10:16, 4:16, 4:16] = SPLEEN
    return labels


def test_crumbs_take_the_nearest_label(labels):
    expected = labels.copy()
    labels[6, 8, 6:15] = LABELS["airway"]  # nine voxels
    labels[12:14, 8:10, 8:10] = LIVER
    labels[0, 0, 0] = LABELS["skull"]
    labels[8, 8, 8] = 0  # a hole
    before = labels.copy()
    without, crumbs = remove_crumbs(labels)
    assert np.array_equal(labels, before) and without.dtype == np.uint8
    assert np.array_equal(without, expected) and crumbs == 9 + 8 + 1 + 1


def test_crumbs_beside_each_other(labels):
    """None of them takes the label of another."""
    expected = labels.copy()
    for i in range(9):
        labels[6, 6 + i, 6 : 6 + i + 1] = 33 + i
    without, crumbs = remove_crumbs(labels)
    assert np.array_equal(without, expected) and crumbs == 45


def test_ten_voxels_stay(labels):
    labels[6, 5:15, 8] = LABELS["airway"]  # also where they only share corners
    labels[range(5, 15), range(5, 15), [4] * 10] = LABELS["aorta"]
    without, crumbs = remove_crumbs(labels)
    assert np.array_equal(without, labels) and crumbs == 0


def test_nothing_but_crumbs():
    labels = np.zeros((2, 2, 2), dtype=np.uint8)
    assert np.array_equal(remove_crumbs(labels)[0], labels)


def test_a_phantom_stays_nearly_as_it_is():
    labels = np.asarray(make_phantom(0, ("chest", "abdomen"), (96, 72, 96), (4.0, 4.0, 4.0)).labels.dataobj)
    without, crumbs = remove_crumbs(labels)
    assert crumbs < 1e-3 * np.count_nonzero(labels)
    assert len(np.unique(without)) > 0.9 * len(np.unique(labels))
