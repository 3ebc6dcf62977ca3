"""A tumor brought to the volume that was asked for."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from maisi_diffusers.anatomy import LABELS, TUMORS, fit_tumor, remove_tumors
from maisi_diffusers.anatomy.tumor_size import LARGEST_SHARE
from maisi_diffusers.phantom import make_phantom, names_of_tumors
from tests.tiny import seeded

SPACING = (4.0, 4.0, 4.0)
TUMOR, LIVER, KIDNEY = LABELS["hepatic tumor"], LABELS["liver"], LABELS["right kidney"]


def ml_of(labels, label, spacing=SPACING):
    return np.count_nonzero(labels == label) * np.prod(spacing) / 1000


@pytest.fixture(scope="module", params=names_of_tumors())
def phantom(request):
    made = make_phantom(0, ("chest", "abdomen"), (96, 72, 128), SPACING, tumor=request.param, tumor_diameter=30)
    return LABELS[request.param], np.asarray(made.labels.dataobj)


@pytest.mark.parametrize("ml", [0.5, 3.0, 14.0, 25.0])
@pytest.mark.parametrize("is_there", [True, False])
def test_volume_and_place(phantom, ml, is_there):
    """It has the volume asked for, in its organ, and where there was none too; and nothing else has changed."""
    tumor, labels = phantom
    if not is_there:
        labels = remove_tumors(labels, SPACING, {tumor: TUMORS[tumor]})
    before = labels.copy()
    fitted = fit_tumor(labels, tumor, ml, SPACING, seeded())
    assert np.array_equal(labels, before) and fitted.dtype == np.uint8
    assert ml_of(fitted, tumor) == pytest.approx(ml, abs=np.prod(SPACING) / 2000)
    changed = fitted != labels
    assert set(labels[changed]) | set(fitted[changed]) <= {tumor, *TUMORS[tumor]}
    if is_there:
        assert ((fitted == tumor) & (labels == tumor)).sum() == min((fitted == tumor).sum(), (labels == tumor).sum())
        assert np.array_equal(fit_tumor(labels, tumor, ml, SPACING, seeded(1)), fitted)  # nothing is drawn
    else:
        _, pieces = ndimage.label(fitted == tumor, np.ones((3, 3, 3)))
        assert pieces == 1
        assert np.array_equal(fit_tumor(labels, tumor, ml, SPACING, seeded()), fitted)


def liver_of(shape=(40, 40, 40)):
    labels = np.full(shape, 200, dtype=np.uint8)
    labels[2:-2, 2:-2, 2:-2] = LIVER
    return labels


def test_grows_evenly_in_mm():
    spacing = np.array([1.0, 2.0, 4.0])
    labels = liver_of((64, 40, 30))
    labels[29:36, 19:22, 14:17] = TUMOR
    fitted = fit_tumor(labels, TUMOR, 4.19, tuple(spacing))
    before, after = (np.ptp(np.argwhere(one == TUMOR), axis=0) * spacing for one in (labels, fitted))
    grown = (after - before) / 2
    assert grown.max() > 5 and (grown > grown.max() - spacing).all()
    assert (fitted == TUMOR).sum() == round(4190 / 8)


def test_shrinks_to_its_middle():
    labels = liver_of()
    labels[10:21, 10:21, 10:21] = TUMOR
    (middle,) = np.argwhere(fit_tumor(labels, TUMOR, 0.001, (1.0, 1.0, 1.0)) == TUMOR)
    assert middle.tolist() == [15, 15, 15]


def test_other_organs_and_cysts_stay():
    labels = liver_of()
    labels[20:, :, :] = KIDNEY
    labels[30, 30, 30] = cyst = LABELS["right kidney cyst"]
    labels[14:20, 17:23, 17:23] = TUMOR
    fitted = fit_tumor(labels, TUMOR, 2.0, (1.0, 1.0, 1.0))
    assert np.array_equal(fitted[20:], labels[20:]) and (fitted == cyst).sum() == 1
    assert (fitted == TUMOR).sum() == 2000


def test_no_more_than_its_organ_bears():
    labels = liver_of((20, 20, 20))
    fitted = fit_tumor(labels, TUMOR, 1000.0, (1.0, 1.0, 1.0), seeded())
    assert (fitted == TUMOR).sum() == int(LARGEST_SHARE * 16**3)


@pytest.mark.parametrize("is_there", [True, False])
def test_without_an_organ(is_there):
    labels = np.full((16, 16, 16), 200, dtype=np.uint8)
    if is_there:
        labels[4:10, 4:10, 4:10] = TUMOR
    assert np.array_equal(fit_tumor(labels, TUMOR, 1.0, SPACING), labels)


def test_gaps_are_not_leapt_over():
    labels = np.full((40, 40, 20), 200, dtype=np.uint8)
    labels[5:35, 10:15, 10:15] = labels[5:35, 18:23, 10:15] = LABELS["colon"]
    labels[18:22, 11:14, 11:14] = tumor = LABELS["colon cancer primaries"]
    fitted = fit_tumor(labels, tumor, 0.5, (1.0, 1.0, 1.0))
    assert (fitted == tumor).sum() == 500 and np.argwhere(fitted == tumor)[:, 1].max() < 15


@pytest.mark.parametrize(
    ("tumor", "ml", "message"),
    [
        (TUMOR, 0.0, "ml=0.0 is no volume"),
        (TUMOR, np.nan, "ml=nan"),
        (TUMOR, np.inf, "ml=inf"),
        (1, 1.0, "tumor=1 is no"),
    ],
)
def test_wrong(tumor, ml, message):
    with pytest.raises(ValueError, match=message):
        fit_tumor(liver_of(), tumor, ml, SPACING)


@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 40, 1), (40, 1, 1), (1, 40, 40)])
def test_flat_ones(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.choice(np.array([LIVER, TUMOR], dtype=np.uint8), shape)
        fitted = fit_tumor(labels, TUMOR, 0.005, (1.0, 1.0, 1.0), seeded(), stray=0.5)
        assert (fitted == TUMOR).sum() == 5


def test_order_of_axes_in_memory():
    labels = liver_of()
    labels[10:20, 10:20, 10:20] = TUMOR
    flat = np.asfortranarray(labels)
    flat.setflags(write=False)
    assert np.array_equal(fit_tumor(flat, TUMOR, 3.0, SPACING), fit_tumor(labels, TUMOR, 3.0, SPACING))


def test_a_tumor_that_is_not_there_has_room():
    """It is not at the rim of its organ, and not in the same place each time."""
    labels = liver_of()
    middles = []
    for seed in range(5):
        where = np.argwhere(fit_tumor(labels, TUMOR, 4.19, (1.0, 1.0, 1.0), seeded(seed)) == TUMOR)
        assert np.ptp(where, axis=0) == pytest.approx([20, 20, 20], abs=2)
        middles.append(tuple(where.mean(0).round()))
    assert len(set(middles)) == 5


def test_a_class_of_ones_own():
    labels = liver_of()
    fitted = fit_tumor(labels, 129, 1.0, (1.0, 1.0, 1.0), torch.Generator().manual_seed(0), {129: (LIVER,)})
    assert (fitted == 129).sum() == 1000


def test_strays_are_not_where_it_grows():
    labels = liver_of()
    labels[2, 2, 2:12] = TUMOR
    was, spacing = labels == TUMOR, (1.0, 1.0, 1.0)
    fitted = fit_tumor(labels, TUMOR, 4.19, spacing, seeded(), stray=0.1)
    assert (fitted == TUMOR).sum() == 4190 and not (fitted[was] == TUMOR).any()
    assert (fit_tumor(labels, TUMOR, 0.1, spacing, seeded(), stray=0.1)[was] == TUMOR).all()
    assert (fit_tumor(labels, TUMOR, 4.19, spacing, seeded())[was] == TUMOR).all()


def test_several_pieces_all_grow():
    labels = liver_of()
    labels[5:10, 5:10, 5:10] = labels[30:34, 30:34, 30:34] = TUMOR
    fitted = fit_tumor(labels, TUMOR, 1.0, (1.0, 1.0, 1.0))
    _, pieces = ndimage.label(fitted == TUMOR)
    assert pieces == 2 and (fitted == TUMOR).sum() == 1000 and (fitted[labels == TUMOR] == TUMOR).all()
