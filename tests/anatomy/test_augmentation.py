"""Variants of label maps: zoomed, or with a tumor that is elsewhere in its organ."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage

from maisi_diffusers.anatomy import BODY, LABELS, TUMORS, augment, label_name
from maisi_diffusers.anatomy.augmentation import (
    OF_OTHERS,
    RANGES,
    SHARES,
    ZOOM,
    ElasticField,
    Ranges,
    deform,
    draw_placement,
    move_tumor,
    moved_boxes,
    piece_boxes,
    zoom,
)
from maisi_diffusers.phantom import make_phantom
from tests.tiny import seeded

# How far every tumor goes, written out: the published ranges (scripts/augmentation.py), those of turns in degrees.
FAR = {
    23: Ranges(shift=(20, 20, 20), turn=(5, 5, 180), scale=(0.15, 0.15, 0.15)),
    24: Ranges(shift=(15, 15, 15), turn=(5, 5, 5), scale=(0.1, 0.1, 0.1)),
    26: Ranges(shift=(10, 10, 10), turn=(5, 5, 5), scale=(0.2, 0.2, 0.2)),
    27: Ranges(shift=(5, 5, 5), turn=(5, 5, 5), scale=(0.1, 0.1, 0.1)),
    128: Ranges(shift=(5, 5, 0), turn=(0, 0, 5.7), scale=(0.15, 0.15, 0), is_elastic=False),
}
SPACING = (4.0, 4.0, 4.0)
REGION_OF = {"lung tumor": ("chest",), "bone lesion": ("chest",)}


@pytest.fixture(scope="module")
def label_maps():
    """Tumor -> a phantom's label map that has it."""
    maps = {}
    for tumor in TUMORS:
        name = label_name(tumor)
        region = REGION_OF.get(name, ("abdomen",))
        phantom = make_phantom(7, region, (96, 96, 64), SPACING, tumor=name, tumor_diameter=28)
        maps[tumor] = np.asarray(phantom.labels.dataobj)
        assert (maps[tumor] == tumor).sum() > 30, name
    return maps


def check_moved(before, after, outcome):
    """The tumor is in its closed organ, large enough, and nothing else has changed but what it left and took."""
    tumor, organs = outcome.tumor, TUMORS[outcome.tumor]
    was, is_now = before == tumor, after == tumor
    changed = before != after
    assert set(np.unique(before[is_now])) <= {tumor, BODY, *organs}
    assert set(np.unique(after[was & ~is_now])) <= {BODY, *organs}
    assert not (changed & ~was & ~is_now).any()
    organ = np.isin(before, [tumor, *organs])
    closed = ndimage.binary_closing(np.pad(organ, 3), np.ones((5, 5, 5)))[3:-3, 3:-3, 3:-3] | organ
    assert not (is_now & ~closed).any()
    assert outcome.share == pytest.approx(is_now.sum() / was.sum())
    assert outcome.share >= (0.75 if outcome.is_moved else 1)
    assert outcome.tries <= 60
    if not outcome.is_moved:
        assert np.array_equal(before, after)


def test_table():
    assert RANGES == FAR and set(FAR) == set(TUMORS) and OF_OTHERS == FAR[26]
    assert ZOOM == (0.99, 1.01) and SHARES == ((0.8, 40), (0.75, 20))


@pytest.mark.parametrize("tumor", TUMORS, ids=label_name)
def test_a_tumor_elsewhere_in_its_organ(label_maps, tumor):
    labels, moved = label_maps[tumor], 0
    before = labels.copy()
    for seed in range(6):
        after, (outcome,) = augment(labels, SPACING, seeded(seed))
        check_moved(labels, after, outcome)
        moved += outcome.is_moved and not np.array_equal(after, labels)
    assert np.array_equal(labels, before)
    assert moved >= 4


def test_a_cyst_beside_the_tumor_stays(label_maps):
    labels = label_maps[26].copy()
    kidney = np.argwhere(labels == LABELS["right kidney"])
    cyst = tuple(kidney[len(kidney) // 2])
    labels[cyst] = LABELS["right kidney cyst"]
    for seed in range(4):
        after, (outcome,) = augment(labels, SPACING, seeded(seed))
        assert after[cyst] == LABELS["right kidney cyst"], outcome


@pytest.mark.slow
@pytest.mark.parametrize("tumor", TUMORS, ids=label_name)
def test_fifty_seeds(tumor):
    name, spacing = label_name(tumor), (5.0, 6.0, 7.0)
    moved = 0
    for seed in range(50):
        region = REGION_OF.get(name, ("abdomen",))
        phantom = make_phantom(seed, region, (80, 54, 46), spacing, tumor=name, tumor_diameter=25 + seed % 20)
        labels = np.asarray(phantom.labels.dataobj)
        if not (labels == tumor).any():
            continue
        after, (outcome,) = augment(labels, spacing, seeded(seed))
        check_moved(labels, after, outcome)
        moved += outcome.is_moved
    assert moved >= 30


def test_seeds(label_maps):
    labels = label_maps[LABELS["hepatic tumor"]]
    first, same, other = (augment(labels, SPACING, seeded(seed))[0] for seed in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    generator = seeded(0)
    assert not np.array_equal(augment(labels, SPACING, generator)[0], augment(labels, SPACING, generator)[0])
    augment(labels, SPACING)  # without a generator


def test_the_spacing_counts():
    """Ranges are in mm: on a grid twice as fine a tumor goes twice as many voxels."""
    far = []
    for mm, n in ((4.0, 40), (2.0, 80)):
        labels = np.full((n, n, n), LABELS["liver"], dtype=np.uint8)
        middle = slice(int(0.4 * n), int(0.6 * n))
        labels[middle, middle, middle] = LABELS["hepatic tumor"]
        after, _ = move_tumor(labels, LABELS["hepatic tumor"], (mm,) * 3, np.random.default_rng(3), (1,))
        was, is_now = (np.argwhere(array == LABELS["hepatic tumor"]) for array in (labels, after))
        assert len(is_now) == pytest.approx(len(was), rel=0.7)
        far.append((is_now.mean(0) - was.mean(0)) * mm)
    assert np.linalg.norm(far[0]) > 3
    np.testing.assert_allclose(far[0], far[1], atol=1.5)


def test_a_comet():
    """A large piece and a small one 110 mm away, about a centre that is near the large one: both get where there is
    room, as far from each other as they were, and nothing of them is cut off."""
    tumor, mm = LABELS["lung tumor"], 4.0
    labels = np.full((96, 96, 56), LABELS["left lung upper lobe"], dtype=np.uint8)
    labels[40:54, 40:54, 20:34] = tumor
    labels[65:70, 65:70, 24:29] = tumor
    for seed in range(8):
        after, (outcome,) = augment(labels, (mm,) * 3, seeded(seed))
        pieces, count = ndimage.label(after == tumor, np.ones((3, 3, 3)))
        assert outcome.is_moved and count == 2
        small, large = np.sort(np.bincount(pieces.ravel())[1:])
        assert small / 5**3 == pytest.approx(large / 14**3, rel=0.5)
        distance = np.linalg.norm(np.diff(ndimage.center_of_mass(after == tumor, pieces, [1, 2]), axis=0)) * mm
        assert distance == pytest.approx(np.sqrt(2) * 20 * mm, rel=0.2)


@pytest.mark.parametrize("tumor", TUMORS, ids=label_name)
def test_boxes_have_all_of_a_tumor(tumor):
    """What is looked up in the boxes of its pieces is what is looked up in all of the volume."""
    is_tumor, spacing, rng = np.zeros((48, 40, 36), dtype=bool), (3.0, 4.0, 5.0), np.random.default_rng(0)
    is_tumor[14:22, 12:20, 10:18] = is_tumor[34:38, 26:29, 22:25] = is_tumor[2, 36, 33] = True
    everywhere, pieces = np.ones_like(is_tumor), piece_boxes(np.argwhere(is_tumor))
    volume = np.array([[(0, 0, 0), is_tumor.shape]])
    assert len(pieces) == 3
    for _ in range(20):
        placement = draw_placement(np.argwhere(is_tumor).mean(0), spacing, RANGES[tumor], rng)
        field = ElasticField(volume, spacing, rng) if RANGES[tumor].is_elastic else None
        boxes = moved_boxes(pieces, placement, spacing, is_tumor.shape)
        moved = deform(is_tumor, placement, field, boxes, everywhere)
        assert np.array_equal(moved, deform(is_tumor, placement, field, volume, everywhere))
        assert (boxes[:, 1] - boxes[:, 0]).prod(1).sum() < is_tumor.size


@pytest.mark.parametrize(
    ("pieces", "bytes_a_voxel"), [([(20, 28), (132, 140)], 10), ([(30, 130)], 25)], ids=["scattered", "large"]
)
def test_memory(pieces, bytes_a_voxel):
    """It is that of some masks of the volume, and what is between the pieces of a scattered tumor costs no more."""
    labels = np.full((160, 160, 160), LABELS["liver"], dtype=np.uint8)
    for piece in pieces:
        labels[(slice(*piece),) * 3] = LABELS["hepatic tumor"]
    tracemalloc.start()
    after, (outcome,) = augment(labels, (1.0,) * 3, seeded())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    _, count = ndimage.label(after == LABELS["hepatic tumor"], np.ones((3, 3, 3)))
    assert outcome.is_moved and count == len(pieces)
    assert peak < bytes_a_voxel * labels.size


def test_a_slab_at_a_time(label_maps, monkeypatch):
    labels = label_maps[LABELS["hepatic tumor"]]
    whole, outcome = augment(labels, SPACING, seeded())
    monkeypatch.setattr("maisi_diffusers.anatomy.augmentation.SLAB", 2000)
    in_slabs, same = augment(labels, SPACING, seeded())
    assert np.array_equal(in_slabs, whole) and same == outcome


def test_elastic_field():
    """It moves voxels by 0.5 to 1.1 mm, and those near each other alike, whatever the spacing."""
    rng = np.random.default_rng(0)
    for spacing in ((2.0, 2.0, 2.0), (1.0, 4.0, 3.0)):
        shape = tuple(int(160 / mm) for mm in spacing)
        field = ElasticField(np.array([[(0, 0, 0), shape]]), spacing, rng)
        voxels = field(tuple(slice(0, n) for n in shape))
        assert voxels.shape == (3, *shape)
        for axis, mm in enumerate(spacing):
            along = voxels[axis] * mm
            assert 0.45 < along.std() < 1.2
            lag = int(8 / mm)
            near, far = np.moveaxis(along, axis, 0)[:-lag], np.moveaxis(along, axis, 0)[lag:]
            assert 0.4 < np.corrcoef(near.ravel(), far.ravel())[0, 1] < 0.9
        part = field((slice(10, 20), slice(5, 30), slice(7, 9)))
        np.testing.assert_allclose(part, voxels[:, 10:20, 5:30, 7:9], atol=1e-12)


def test_nowhere_to_go():
    """An organ that its tumor fills, with other organs all around: it stays, and the tries are bounded."""
    labels = np.full((40, 40, 40), LABELS["stomach"], dtype=np.uint8)
    labels[18:21, 18:21, 18:21] = LABELS["pancreatic tumor"]
    labels[21, 18:21, 18:21] = LABELS["pancreas"]
    after, (outcome,) = augment(labels, (4.0,) * 3, seeded())
    assert np.array_equal(after, labels)
    assert not outcome.is_moved and outcome.tries == 60 and outcome.share == 1


def test_a_tumor_at_the_edge_of_the_volume():
    labels = np.full((24, 24, 24), LABELS["liver"], dtype=np.uint8)
    labels[:6, :6, :6] = LABELS["hepatic tumor"]
    for seed in range(5):
        after, (outcome,) = augment(labels, (3.0,) * 3, seeded(seed))
        check_moved(labels, after, outcome)


def test_a_new_tumor_of_a_fine_tuned_model():
    labels = np.full((40, 40, 40), LABELS["left kidney"], dtype=np.uint8)
    labels[16:22, 16:22, 16:22] = 129
    after, (outcome,) = augment(labels, (3.0,) * 3, seeded(), {**TUMORS, 129: (LABELS["left kidney"],)})
    assert outcome.is_moved and outcome.tumor == 129 and not np.array_equal(after, labels)
    assert set(np.unique(after)) == {129, LABELS["left kidney"]}


def test_all_tumors_of_a_label_map():
    labels = np.full((60, 40, 40), LABELS["liver"], dtype=np.uint8)
    labels[30:] = LABELS["left lung upper lobe"]
    labels[12:18, 17:23, 17:23] = LABELS["hepatic tumor"]
    labels[42:48, 17:23, 17:23] = LABELS["lung tumor"]
    after, outcomes = augment(labels, (3.0,) * 3, seeded())
    assert {outcome.tumor for outcome in outcomes} == {LABELS["hepatic tumor"], LABELS["lung tumor"]}
    assert (after[:30] != LABELS["lung tumor"]).all() and (after[30:] != LABELS["hepatic tumor"]).all()


def test_zoom_without_a_tumor():
    labels = np.asarray(make_phantom(2, ("abdomen",), (200, 200, 24), (2.0, 2.0, 4.0)).labels.dataobj)
    factors = set()
    for seed in range(4):
        after, outcomes = augment(labels, SPACING, seeded(seed))
        assert outcomes == [] and after.shape == labels.shape and after.dtype == np.uint8
        assert set(np.unique(after)) <= set(np.unique(labels))
        assert np.mean(after != labels) < 0.06
        factors.add(after.tobytes())
    assert len(factors) > 1


def test_zoom():
    labels = np.zeros((40, 41, 42), dtype=np.uint8)
    labels[10:30, 10:30, 10:30] = 1
    assert np.array_equal(zoom(labels, 1.0), labels)
    assert (zoom(labels, 1.5) == 1).sum() == pytest.approx(20**3 * 1.5**3, rel=0.1)
    small = zoom(labels, 0.5)
    assert (small == 1).sum() == pytest.approx(10**3, rel=0.2)
    np.testing.assert_allclose(np.argwhere(small).mean(0), (np.array(small.shape) - 1) / 2, atol=1)


def test_a_body_cut_by_the_first_and_the_last_slice_still_is():
    labels = np.zeros((40, 41, 42), dtype=np.uint8)
    labels[10:30, 10:30] = 200
    for factor in (0.9, 0.99):
        assert (zoom(labels, factor)[20, 20] == 200).all()


def test_any_device_that_draws_random_numbers():
    labels = np.full((24, 24, 24), LABELS["liver"], dtype=np.uint8)
    labels[9:14, 9:14, 9:14] = LABELS["hepatic tumor"]
    assert move_tumor(labels, LABELS["hepatic tumor"], (3.0,) * 3, np.random.default_rng(0), (1,))[1].is_moved
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        augment(labels, (3.0,) * 3, torch.Generator(device).manual_seed(0))
