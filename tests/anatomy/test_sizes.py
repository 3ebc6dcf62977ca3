"""Sizes of the controllable anatomy."""

import numpy as np
import pytest

from maisi_diffusers.anatomy import CONTROLLABLE_ANATOMY, LABELS, anatomy_sizes, size_of_volume, volume_of_size
from maisi_diffusers.phantom import SIZE_RANGES

SPACING = (3.0, 3.0, 3.0)


def label_map(**ml):
    labels = np.zeros((100, 100, 100), dtype=np.uint8)
    flat, start = labels.reshape(-1), 0
    for name, volume in ml.items():
        voxels = round(volume * 1000 / 27)
        flat[start : start + voxels] = LABELS[name.replace("_", " ")]
        start += voxels
    return labels


def test_what_is_not_there_is_absent():
    assert anatomy_sizes(label_map(), SPACING, SIZE_RANGES) == [-1.0] * 10


def test_range_and_order():
    sizes = anatomy_sizes(
        label_map(liver=SIZE_RANGES["liver"][1], hepatic_tumor=0.6, colon=100.0), SPACING, SIZE_RANGES
    )
    by_name = dict(zip(CONTROLLABLE_ANATOMY, sizes))
    assert by_name["liver"] == pytest.approx(1.0, abs=1e-3)
    assert by_name["colon"] == 0.0  # smaller than the smallest, yet there
    assert 0 < by_name["hepatic tumor"] < 0.05
    assert by_name["stomach"] == -1.0


def test_size_is_linear_in_the_diameter_of_a_tumor():
    diameters = np.array([20.0, 35.0, 50.0])
    sizes = [
        anatomy_sizes(label_map(lung_tumor=np.pi / 6 * (d / 10) ** 3), SPACING, SIZE_RANGES)[
            CONTROLLABLE_ANATOMY.index("lung tumor")
        ]
        for d in diameters
    ]
    np.testing.assert_allclose(sizes, (diameters - 10) / 50, atol=0.005)


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0])
def test_volumes_and_sizes(size):
    limits = (4.0, 60.0)
    ml = volume_of_size(size, limits)
    assert limits[0] <= ml <= limits[1] + 1e-9 and size_of_volume(ml, limits) == pytest.approx(size)


def test_volumes_beyond():
    assert (size_of_volume(0.0, (4.0, 60.0)), size_of_volume(99.0, (4.0, 60.0))) == (0.0, 1.0)
