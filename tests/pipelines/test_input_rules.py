import math

import pytest

from maisi_diffusers.pipelines.input_rules import CT_RULES, MR_RULES, check_grid, fit_grid, nearest_grid


@pytest.mark.parametrize(
    ("rules", "size", "spacing"),
    [
        (CT_RULES, (512, 512, 768), (1.0, 1.0, 1.0)),
        (CT_RULES, (256, 256, 128), (1.0, 1.0, 5.0)),
        (CT_RULES, (384, 384, 640), (3.0, 3.0, 0.5)),
        (MR_RULES, (128, 256, 256), (1.25, 1.0, 1.0)),
        (MR_RULES, (128, 128, 256), (1.25, 1.0, 1.0)),
        (MR_RULES, (512, 512, 128), (0.4, 0.5, 5.0)),
        (None, (64, 32, 96), (0.1, 7.0, 20.0)),
    ],
)
def test_allowed(rules, size, spacing):
    check_grid(size, spacing, 32, rules)
    assert nearest_grid(size, spacing, 32, rules) == (size, spacing)


@pytest.mark.parametrize(
    ("rules", "size", "spacing", "message"),
    [
        (None, (64, 33, 96), (1, 1, 1), r"\(64, 33, 96\) does not divide by 32.*nearest is \(64, 32, 96\)"),
        (CT_RULES, (256, 384, 128), (1, 1, 1), "one of 256x256x128, 256x256x256"),
        (CT_RULES, (128, 128, 128), (3, 3, 3), "not one that this model was trained for"),
        (CT_RULES, (256, 256, 896), (1, 1, 1), "not one that this model was trained for"),
        (CT_RULES, (512, 512, 128), (0.45, 0.45, 1), "0.5 to 3.0 mm along X"),
        (CT_RULES, (512, 512, 128), (1, 1, 5.5), "0.5 to 5.0 mm along Z"),
        (CT_RULES, (512, 512, 128), (1, 1.1, 1), "differs in X and Y"),
        (CT_RULES, (256, 256, 128), (0.9, 0.9, 1), "230.4 x 230.4 mm.*256 mm"),
        (MR_RULES, (128, 256, 128), (1, 1, 1), "not one that this model was trained for"),
        (MR_RULES, (256, 256, 256), (0.3, 1, 1), "0.4 to 5.0 mm along X"),
    ],
)
def test_refused(rules, size, spacing, message):
    with pytest.raises(ValueError, match=message):
        check_grid(size, spacing, 32, rules)


@pytest.mark.parametrize(
    ("rules", "size", "spacing", "grid", "mm"),
    [
        (None, (122, 101, 112), (3.0, 3.0, 3.0), (128, 96, 128), (366 / 128, 303 / 96, 336 / 128)),
        (None, (7, 33, 36), (1.0, 1.0, 1.0), (32, 32, 32), (7 / 32, 33 / 32, 36 / 32)),
        # the larger of X and Y serves both, nothing is cropped
        (CT_RULES, (122, 101, 112), (3.0, 3.0, 3.0), (256, 256, 128), (366 / 256, 366 / 256, 336 / 128)),
        (CT_RULES, (512, 512, 140), (0.8, 0.8, 2.5), (512, 512, 128), (0.8, 0.8, 350 / 128)),
        # too small a field of view is enlarged, too large a spacing clipped
        (CT_RULES, (128, 128, 128), (1.0, 1.0, 1.0), (256, 256, 128), (1.0, 1.0, 1.0)),
        (CT_RULES, (100, 100, 200), (3.0, 3.0, 8.0), (256, 256, 384), (300 / 256, 300 / 256, 1600 / 384)),
    ],
)
def test_nearest(rules, size, spacing, grid, mm):
    found, found_mm = nearest_grid(size, spacing, 32, rules)
    assert found == grid
    assert found_mm == pytest.approx(mm)
    check_grid(found, found_mm, 32, rules)


def test_nearest_never_crops_where_it_can():
    for size in ((100, 100, 50), (300, 200, 900), (512, 400, 700)):
        for spacing in ((0.6, 0.6, 0.6), (1.0, 1.0, 5.0), (1.4, 1.4, 1.0)):
            grid, mm = nearest_grid(size, spacing, 32, CT_RULES)
            for own, own_mm, n, voxel in zip(size, spacing, grid, mm):
                assert n * voxel >= own * own_mm * (1 - 1e-9) or math.isclose(voxel, 5.0)


def test_what_is_not_given_keeps_the_field_of_view():
    given = ((122, 101, 112), (3.0, 3.0, 3.0))
    assert fit_grid(*given, (64, 64, 64), None, 32, None) == ((64, 64, 64), (366 / 64, 303 / 64, 336 / 64))
    # or enlarges it: never is anything cropped unasked
    assert fit_grid(*given, None, (3.0, 3.0, 2.0), 32, None) == ((128, 128, 192), (3.0, 3.0, 2.0))
    assert fit_grid(*given, None, (1.5, 1.5, 3.0), 32, CT_RULES) == ((256, 256, 128), (1.5, 1.5, 3.0))
    assert fit_grid(*given, (256, 256, 128), None, 32, CT_RULES) == ((256, 256, 128), (366 / 256, 366 / 256, 2.625))
    assert fit_grid(*given, (32, 32, 32), (1.0, 2.0, 3.0), 32, None) == ((32, 32, 32), (1.0, 2.0, 3.0))
