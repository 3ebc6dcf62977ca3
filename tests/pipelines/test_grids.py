"""The grid where a call leaves it out, warnings of unusual fields of view, and labels that are kept."""

import warnings

import numpy as np
import pytest

from maisi_diffusers import MaisiMaskDatabase
from maisi_diffusers.pipelines.input_rules import CT_RULES
from maisi_diffusers.pipelines.recommended_grids import RECOMMENDED_CT_GRIDS, describe_unusual_fov, recommended_grid
from tests.mask_databases import make_database
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded


@pytest.fixture
def published():
    """A tiny pipeline with the published rules."""
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(input_rules=CT_RULES)
    return pipe


def test_what_suits_the_region(published):
    assert published.choose_grid(["chest"], None, None) == ((512, 512, 128), (0.684, 0.684, 2.422))
    assert published.choose_grid(["Thorax", "abdomen"], None, None) == ((512, 512, 128), (0.781, 0.781, 2.981))
    assert published.choose_grid(["pelvis"], None, None) == RECOMMENDED_CT_GRIDS[("lower",)]
    for regions in (None, ["head"], ["head", "pelvis"]):  # nothing is recommended
        assert published.choose_grid(regions, None, None) == ((512, 512, 512), (1.0, 1.0, 1.0))


def test_one_of_both_keeps_the_field_of_view(published):
    size, spacing = published.choose_grid(["chest"], (256, 256, 128), None)
    assert size == (256, 256, 128) and spacing == pytest.approx((1.368, 1.368, 2.422))
    size, spacing = published.choose_grid(["chest"], None, (1.0, 1.0, 2.5))
    assert spacing == (1.0, 1.0, 2.5) and size == (384, 384, 128)  # 350 x 350 x 310 mm
    assert published.choose_grid(["chest"], (512, 512, 512), (0.7, 0.7, 0.7)) == ((512,) * 3, (0.7,) * 3)


def test_a_model_of_its_own():
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(default_output_size=[128, 128, 96], default_spacing=[3.0, 3.0, 4.0])
    assert pipe.choose_grid(["chest"], None, None) == ((128, 128, 96), (3.0, 3.0, 4.0))
    assert pipe.choose_grid(None, None, (6.0, 6.0, 6.0)) == ((64, 64, 64), (6.0, 6.0, 6.0))
    assert pipe.choose_grid(None, (64, 64, 64), None) == ((64, 64, 64), (6.0, 6.0, 6.0))


def test_every_recommendation_is_found():
    for words, grid in RECOMMENDED_CT_GRIDS.items():
        regions = [{"head": 0, "chest": 1, "abdomen": 2, "lower": 3}[word] for word in words]
        assert recommended_grid(reversed(regions)) == grid
        assert describe_unusual_fov(regions, *grid) is None


@pytest.mark.parametrize(
    "size, spacing, is_unusual",
    [
        ((512, 512, 128), (0.684, 0.684, 2.422), False),
        ((256, 256, 128), (1.2, 1.2, 2.0), False),
        ((512, 512, 128), (0.5, 0.5, 2.422), True),  # 256 mm
        ((512, 512, 128), (1.2, 1.2, 2.422), True),  # 614 mm
        ((512, 512, 128), (0.684, 0.684, 1.0), True),  # 128 mm
        ((512, 512, 768), (0.684, 0.684, 1.0), True),  # 768 mm
    ],
)
def test_unusual_fields_of_view(size, spacing, is_unusual):
    message = describe_unusual_fov([1], size, spacing)
    assert (message is not None) == is_unusual
    if is_unusual:
        assert "far from the 350 x 350 x 310 mm that the model has seen of chest" in message
        assert "(512, 512, 128) at (0.684, 0.684, 2.422) mm" in message


class PreparedError(Exception):
    """The pipeline has come as far as the networks."""


def test_the_warning(published, monkeypatch):
    def stop(*args, **kwargs):
        raise PreparedError

    monkeypatch.setattr(published, "prepare_conditions", stop)
    request = {"image_only": True, "output_size": (512, 512, 128)}
    with pytest.warns(UserWarning, match="the field of view of 768 x 768 x 256 mm of size .* of chest"):
        with pytest.raises(PreparedError):
            published(**request, body_region=["chest"], spacing=(1.5, 1.5, 2.0))
    with pytest.warns(UserWarning, match="has seen of chest and abdomen and pelvis"):  # by the labels of the map
        with pytest.raises(PreparedError):
            published(mask=make_label_map(), output_size=(256, 256, 128), spacing=(1.0, 1.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for kwargs in ({"body_region": ["chest"]}, {"spacing": (1.5, 1.5, 2.0)}):
            with pytest.raises(PreparedError):
                published(**request, **kwargs)


def test_labels_that_are_kept(tmp_path):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.mask_database = MaisiMaskDatabase(make_database(tmp_path))
    request = {"anatomy_list": ["hepatic tumor", "liver"], "body_region": ["abdomen"]}
    grid = {"output_size": SIZE, "spacing": SPACING}
    whole, kept = (pipe(**request, **grid, keep_only_anatomy_list=only, generator=seeded()) for only in (False, True))
    labels = np.asarray(whole.labels[0].dataobj)
    assert set(np.unique(labels)) == {0, 1, 26, 200}
    assert np.array_equal(kept.labels[0].dataobj, np.where(np.isin(labels, (1, 26)), labels, 0))
    assert np.array_equal(kept.images[0].dataobj, whole.images[0].dataobj)
    assert np.allclose(kept.labels[0].affine, whole.labels[0].affine)


def test_nothing_to_keep():
    pipe = make_pipeline(with_mask_networks=False)
    with pytest.raises(ValueError, match="keep_only_anatomy_list=True .* there is neither: give one"):
        pipe(mask=make_label_map(), keep_only_anatomy_list=True)
