import numpy as np
import pytest

from maisi_diffusers.anatomy import (
    LABELS,
    TOTALSEGMENTATOR_CLASSES,
    TOTALSEGMENTATOR_TO_MAISI,
    label_name,
    totalsegmentator_to_maisi,
)


def test_every_class_has_a_label_of_its_own():
    assert len(set(TOTALSEGMENTATOR_CLASSES)) == 117
    assert TOTALSEGMENTATOR_TO_MAISI[0] == 0
    assert len(set(TOTALSEGMENTATOR_TO_MAISI.tolist())) == 118
    # What MAISI has beyond them: tumors, hepatic vessels, airway, body and the free labels.
    extra = {label_name(label) for label in set(LABELS.values()) - set(TOTALSEGMENTATOR_TO_MAISI.tolist())}
    assert {name for name in extra if not name.startswith("dummy")} == {
        *("lung tumor", "pancreatic tumor", "hepatic vessel", "hepatic tumor", "colon cancer primaries"),
        *("bone lesion", "airway", "body"),
    }


@pytest.mark.parametrize(
    ("number", "theirs", "ours"),
    [
        (1, "spleen", "spleen"),
        (2, "kidney_right", "right kidney"),
        (3, "kidney_left", "left kidney"),
        (8, "adrenal_gland_right", "right adrenal gland"),
        (10, "lung_upper_lobe_left", "left lung upper lobe"),
        (13, "lung_middle_lobe_right", "right lung middle lobe"),
        (21, "urinary_bladder", "bladder"),
        (23, "kidney_cyst_left", "left kidney cyst"),
        (26, "vertebrae_S1", "vertebrae S1"),
        (27, "vertebrae_L5", "vertebrae L5"),
        (31, "vertebrae_L1", "vertebrae L1"),
        (32, "vertebrae_T12", "vertebrae T12"),
        (50, "vertebrae_C1", "vertebrae C1"),
        (55, "subclavian_artery_right", "right subclavian artery"),
        (58, "common_carotid_artery_left", "left common carotid artery"),
        (59, "brachiocephalic_vein_left", "left brachiocephalic vein"),
        (61, "atrial_appendage_left", "left atrial appendage"),
        (64, "portal_vein_and_splenic_vein", "portal vein and splenic vein"),
        (65, "iliac_artery_left", "left iliac artery"),
        (68, "iliac_vena_right", "right iliac vena"),
        (73, "clavicula_left", "left clavicula"),
        (78, "hip_right", "right hip"),
        (79, "spinal_cord", "spinal cord"),
        (85, "gluteus_minimus_right", "right gluteus minimus"),
        (89, "iliopsoas_right", "right iliopsoas"),
        (90, "brain", "brain"),
        (92, "rib_left_1", "left rib 1"),
        (103, "rib_left_12", "left rib 12"),
        (104, "rib_right_1", "right rib 1"),
        (115, "rib_right_12", "right rib 12"),
        (116, "sternum", "sternum"),
        (117, "costal_cartilages", "costal cartilages"),
    ],
)
def test_classes(number, theirs, ours):
    assert TOTALSEGMENTATOR_CLASSES[number - 1] == theirs
    assert TOTALSEGMENTATOR_TO_MAISI[number] == LABELS[ours]


def test_sides_never_cross():
    for name, label in zip(TOTALSEGMENTATOR_CLASSES, TOTALSEGMENTATOR_TO_MAISI[1:]):
        for side in ("left", "right"):
            assert (side in name) == (side in label_name(label))


def test_translates_voxel_by_voxel():
    labels = np.array([[[0, 2], [3, 117]]], np.uint8)
    translated = totalsegmentator_to_maisi(labels)
    assert translated.dtype == np.uint8
    assert translated.tolist() == [[[0, 5], [14, 114]]]


def test_names_labels_it_does_not_know():
    with pytest.raises(ValueError, match=r"\[118, 200\].*vocabulary="):
        totalsegmentator_to_maisi(np.array([[[1, 118, 200]]], np.uint8))
