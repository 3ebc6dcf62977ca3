import numpy as np
import pytest
import torch

from maisi_diffusers.imaging import background_value, from_hu, to_hu


@pytest.mark.parametrize("array", [np.float32, torch.tensor])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, [-1000, -1000, 0, 1000, 1000]),  # unknown counts as CT
        (1, [-1000, -1000, 0, 1000, 1000]),
        (7, [-1000, -1000, 0, 1000, 1000]),
        (8, [0, 0, 500, 1000, 1500]),
        (33, [0, 0, 500, 1000, 1500]),
    ],
)
def test_to_hu_clips_both_ends_for_ct_and_the_lower_for_mr(array, code, expected):
    intensities = array([-0.1, 0, 0.5, 1, 1.5])
    units = to_hu(intensities, code)
    assert type(units) is type(intensities) and units.dtype == intensities.dtype
    assert units.tolist() == expected
    assert from_hu(units, code).tolist() == [0, 0, 0.5, 1, max(1.0, expected[-1] / 1000)]


@pytest.mark.parametrize("array", [lambda x: np.array(x, np.int16), lambda x: torch.tensor(x, dtype=torch.int16)])
def test_from_hu_takes_what_scanners_write(array):
    assert from_hu(array([-32768, -1024, 0, 32767]), 1).tolist() == [0, 0, 0.5, 1]
    assert from_hu(array([-5, 0, 2000]), 9).tolist() == [0, 0, 2]


def test_background():
    assert [background_value(code) for code in (0, 1, 3, 8, 29)] == [-1000, -1000, -1000, 0, 0]
