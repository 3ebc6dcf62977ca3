import pytest

from maisi_diffusers.imaging import MODALITIES, is_ct, modality_code


@pytest.mark.parametrize(
    ("modality", "code"),
    [
        *[("unknown", 0), ("ct", 1), ("CT", 1), ("ct_wo_contrast", 2), ("ct_contrast", 3), ("mri", 8)],
        *[("t1", 9), ("t2", 10), ("flair", 11), ("pd", 12), ("dwi", 13), ("adc", 14), ("ssfp", 15), ("mra", 16)],
        *[("t1c", 17), ("swi", 20), ("mri_t1", 9), ("mri_swi", 20), ("mri_t1_skull_stripped", 29)],
        *[("mri_t2_skull_stripped", 30), ("mri_flair_skull_stripped", 31), ("mri_swi_skull_stripped", 32)],
        *[("mri_mra_skull_stripped", 33), ("t1_skull_stripped", 29), (0, 0), (1, 1), (34, 34), (127, 127)],
    ],
)
def test_codes(modality, code):
    assert modality_code(modality) == code


@pytest.mark.parametrize("modality", ["pet", "", -1, 128])
def test_unknown_modalities_are_refused(modality):
    with pytest.raises(ValueError, match="unknown, ct, ct_wo_contrast.*mri_mra_skull_stripped"):
        modality_code(modality)


def test_is_ct():
    assert {name for name in MODALITIES if is_ct(MODALITIES[name])} == {
        "unknown",
        "ct",
        "ct_wo_contrast",
        "ct_contrast",
    }
    assert is_ct(7) and not is_ct(8)
