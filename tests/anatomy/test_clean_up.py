"""Generated label maps are cleaned up, rule by rule."""

import numpy as np
import pytest

from maisi_diffusers.anatomy import BODY, LABELS, clean_up, label_index, label_name
from maisi_diffusers.phantom import make_phantom

LIVER, SPLEEN, PANCREAS, STOMACH, COLON, SMALL_BOWEL = map(
    label_index, ("liver", "spleen", "pancreas", "stomach", "colon", "small bowel")
)
LIVER_TUMOR, LUNG_TUMOR, COLON_TUMOR, PANCREAS_TUMOR, BONE_LESION = map(
    label_index, ("hepatic tumor", "lung tumor", "colon cancer primaries", "pancreatic tumor", "bone lesion")
)
LOBE, OTHER_LOBE, VERTEBRA, VESSEL, AIRWAY = map(
    label_index,
    ("left lung upper lobe", "left lung lower lobe", "vertebrae L1", "hepatic vessel", "airway"),
)


@pytest.fixture
def labels():
    """A body with air around it and a liver in it."""
    labels = np.zeros((48, 40, 40), dtype=np.uint8)
    labels[4:44, 4:36, 2:38] = BODY
    labels[8:20, 8:20, 8:20] = LIVER
    return labels


def test_a_clean_one_stays_as_it_is(labels):
    clean, report = clean_up(labels)
    assert np.array_equal(clean, labels)
    assert report.off_body == 0 and not report.organ_pieces and not report.closed


def test_the_argument_stays_as_it_is(labels):
    labels[30, 30, 30] = LIVER
    before = labels.copy()
    clean_up(labels)
    assert np.array_equal(labels, before)


def test_one_body(labels):
    clean = labels.copy()
    labels[46, 2, 20] = BODY  # a stray island
    labels[44:48, 20:22, 20:22] = BODY  # a bridge, and what hangs on it
    result, report = clean_up(labels)
    assert np.array_equal(result, clean) and report.off_body == 1 + 16


@pytest.mark.parametrize(
    "other, organ, becomes",
    [
        (LIVER_TUMOR, LIVER, LIVER),
        (PANCREAS_TUMOR, PANCREAS, PANCREAS),
        (COLON_TUMOR, COLON, COLON),
        (LUNG_TUMOR, OTHER_LOBE, OTHER_LOBE),
        (BONE_LESION, VERTEBRA, BODY),
    ],
)
def test_tumors_not_asked_for_become_their_organ(labels, other, organ, becomes):
    labels[8:20, 8:20, 8:20] = BODY
    labels[26:36, 10:20, 10:20] = organ
    labels[30:36, 14:20, 14:20] = other  # at a corner, where no closing brings a vertebra back
    clean, report = clean_up(labels)
    assert (clean[30:36, 14:20, 14:20] == becomes).all() and report.other_tumors == 216
    assert other not in clean


def test_of_two_tumors_the_one_asked_for_stays(labels):
    labels[10:13, 10:13, 10:13] = LIVER_TUMOR
    labels[26:36, 10:20, 10:20] = LOBE
    labels[30:33, 12:15, 12:15] = LUNG_TUMOR
    clean, _ = clean_up(labels, LIVER_TUMOR)
    assert (clean[10:13, 10:13, 10:13] == LIVER_TUMOR).all() and LUNG_TUMOR not in clean
    clean, _ = clean_up(labels, LUNG_TUMOR)
    assert (clean[30:33, 12:15, 12:15] == LUNG_TUMOR).all() and LIVER_TUMOR not in clean


def test_a_tumor_closes_in_its_organ(labels):
    labels[10:15, 10:15, 10:15] = LIVER_TUMOR
    labels[12, 12, 12] = LIVER
    clean, _ = clean_up(labels, LIVER_TUMOR)
    assert (clean[10:15, 10:15, 10:15] == LIVER_TUMOR).all()


@pytest.mark.parametrize("tumor, organ", [(LUNG_TUMOR, LOBE), (PANCREAS_TUMOR, PANCREAS), (COLON_TUMOR, COLON)])
def test_one_piece_of_a_tumor(labels, tumor, organ):
    labels[26:40, 10:22, 10:22] = organ
    labels[28:31, 12:15, 12:15] = tumor
    labels[35:37, 18:20, 18:20] = tumor
    clean, report = clean_up(labels, tumor)
    assert (clean == tumor).sum() == 27 and report.tumor_pieces == 8
    assert (clean[35:37, 18:20, 18:20] == organ).all()


@pytest.mark.parametrize("tumor, organ", [(LIVER_TUMOR, LIVER), (BONE_LESION, VERTEBRA)])
def test_several_pieces_of_a_scattered_tumor(labels, tumor, organ):
    labels[26:40, 10:22, 10:22] = organ
    labels[8:20, 8:20, 8:20] = BODY
    labels[28:31, 12:15, 12:15] = labels[35:37, 18:20, 18:20] = tumor
    clean, report = clean_up(labels, tumor)
    assert (clean == tumor).sum() == 27 + 8 and report.tumor_pieces == 0


@pytest.mark.parametrize("tumor", [LIVER_TUMOR, PANCREAS_TUMOR])
def test_a_tumor_outside_of_its_organ(labels, tumor):
    labels[24:34, 10:20, 10:20] = PANCREAS
    labels[38:42, 30:34, 30:34] = tumor
    clean, report = clean_up(labels, tumor)
    assert tumor not in clean and report.tumor_pieces == 64
    assert (clean[38:42, 30:34, 30:34] == BODY).all()


# As published: liver, spleen, pancreas, kidneys, adrenals, gallbladder, stomach, duodenum, great vessels, lung lobes.
SINGLE = (1, 3, 4, 5, 14, 8, 9, 10, 12, 13, 6, 7, 28, 29, 30, 31, 32)


@pytest.mark.parametrize("name", [label_name(label) for label in SINGLE])
def test_single_organs_are_one_piece(labels, name):
    labels[8:20, 8:20, 8:20] = BODY
    organ = label_index(name)
    labels[8:14, 8:14, 8:14] = organ
    labels[30:33, 30:33, 30:33] = organ
    clean, report = clean_up(labels)
    assert report.organ_pieces == {organ: 27}
    assert (clean[30:33, 30:33, 30:33] == BODY).all() and (clean == organ).sum() == 216


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_crumbs_along_a_line(labels, axis):
    """Some of them, of one voxel along two axes, cc3d 4.1.1 fails at."""
    row = np.moveaxis(labels, axis, 0)
    row[22:25:2, 30, 30] = SPLEEN
    clean, report = clean_up(labels)
    assert report.organ_pieces == {SPLEEN: 1} and (clean == SPLEEN).sum() == 1


def test_vertebrae_are_one_piece_unless_a_bone_lesion_was_asked_for(labels):
    labels[26:30, 10:14, 10:14] = labels[32:34, 10:12, 10:12] = VERTEBRA
    clean, report = clean_up(labels)
    assert report.organ_pieces == {VERTEBRA: 8}
    clean, report = clean_up(labels, BONE_LESION)
    assert not report.organ_pieces and (clean == VERTEBRA).sum() == 64 + 8


def test_ribs_and_the_like_may_be_in_pieces(labels):
    rib = LABELS["left rib 3"]
    labels[26:30, 10:14, 10:14] = labels[34:36, 10:12, 10:12] = rib
    clean, report = clean_up(labels)
    assert (clean == rib).sum() == 64 + 8 and not report.organ_pieces


def test_bowel_off_the_intestines_becomes_body(labels):
    labels[24:32, 10:20, 10:20] = STOMACH
    labels[32:36, 10:20, 10:20] = COLON
    labels[36:38, 10:20, 10:20] = SMALL_BOWEL
    labels[24:27, 28:31, 28:31] = COLON
    labels[34:36, 28:30, 28:30] = SMALL_BOWEL
    clean, report = clean_up(labels)
    assert report.off_intestines == {COLON: 27, SMALL_BOWEL: 8}
    assert (clean[24:27, 28:31, 28:31] == BODY).all() and (clean[34:36, 28:30, 28:30] == BODY).all()
    assert (clean[32:36, 10:20, 10:20] == COLON).all()


def test_single_organs_close_over_body_alone(labels):
    labels[12:14, 12:14, 12:14] = BODY
    labels[16, 16, 16] = LABELS["portal vein and splenic vein"]
    clean, report = clean_up(labels)
    assert report.closed == {LIVER: 8} and (clean[12:14, 12:14, 12:14] == LIVER).all()
    assert clean[16, 16, 16] == LABELS["portal vein and splenic vein"]


def test_what_was_cut_out_beside_the_organ_of_a_tumor_is_filled_again(labels):
    labels[10:13, 10:13, 10:13] = LIVER_TUMOR
    labels[8:20, 17:20, 8:20] = COLON  # a slab that the mask model took for bowel
    labels[26:36, 26:36, 26:36] = COLON  # the bowel
    clean, report = clean_up(labels, LIVER_TUMOR)
    assert report.off_intestines == {COLON: 12 * 3 * 12}
    assert (clean[8:20, 17:20, 8:20] == LIVER).all()
    clean, _ = clean_up(np.where(labels == LIVER_TUMOR, LIVER, labels).astype(np.uint8))
    assert (clean[8:20, 17:20, 8:20] == BODY).all()  # without a tumor it is body


def test_hepatic_vessel_becomes_liver_and_airway_stays(labels):
    labels[12:14, 12:14, 12:14] = VESSEL
    labels[26:36, 10:20, 10:20] = LOBE
    labels[30, 14, 14] = labels[32, 16, 16] = AIRWAY
    clean, _ = clean_up(labels)
    assert (clean[12:14, 12:14, 12:14] == LIVER).all() and VESSEL not in clean
    assert clean[30, 14, 14] == clean[32, 16, 16] == AIRWAY


def test_a_tumor_that_is_none(labels):
    with pytest.raises(ValueError, match="tumor=1 is no tumor: give one of 23, 24, 26, 27, 128"):
        clean_up(labels, LIVER)


def test_a_phantom_is_hardly_changed():
    labels = np.asarray(make_phantom(3, tumor="hepatic tumor", size=(96, 96, 96), spacing=(4.0,) * 3).labels.dataobj)
    clean, _ = clean_up(labels, LIVER_TUMOR)
    vessels = labels == VESSEL
    assert np.mean((clean != labels) & ~vessels) < 0.005
    assert ((clean == LIVER_TUMOR) == (labels == LIVER_TUMOR)).all()
