"""Closing axis by axis is closing by a cube."""

import numpy as np
import pytest
from scipy import ndimage

from maisi_diffusers.anatomy.closing import close


@pytest.mark.parametrize("width", [3, 5])
def test_as_by_a_cube(width):
    mask = np.random.default_rng(0).random((20, 21, 22)) < 0.03
    mask[:2] = mask[5:7, 5:7, 5:7] = True
    by_cube = ndimage.binary_closing(np.pad(mask, width), np.ones((width,) * 3))[(slice(width, -width),) * 3]
    assert np.array_equal(close(mask, width), by_cube) and by_cube.sum() > mask.sum()
