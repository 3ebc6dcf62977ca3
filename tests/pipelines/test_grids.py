"""The grid where a call leaves it out, warnings of unusual fields of view, and labels that are kept."""

import warnings

import numpy as np
import pytest

from maisi_diffusers import MaisiCTPipeline, MaisiMaskDatabase
from maisi_diffusers.imaging import modality_code
from maisi_diffusers.pipelines.input_rules import CT_RULES, MR_RULES, check_grid
from maisi_diffusers.pipelines.recommended_grids import (
    MR_FOVS,
    RECOMMENDED_CT_GRIDS,
    describe_unusual_fov,
    recommended_grid,
)
from tests.mask_databases import make_database
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded

CT = modality_code("ct")


@pytest.fixture
def published():
    """A tiny pipeline with the published rules."""
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(input_rules=CT_RULES)
    return pipe


def test_what_suits_the_region(published):
    assert published.choose_grid(["chest"], CT, None, None) == ((512, 512, 128), (0.684, 0.684, 2.422))
    assert published.choose_grid(["Thorax", "abdomen"], CT, None, None) == ((512, 512, 128), (0.781, 0.781, 2.981))
    assert published.choose_grid(["pelvis"], CT, None, None) == RECOMMENDED_CT_GRIDS[("lower",)]
    for regions in (None, ["head"], ["head", "pelvis"]):  # nothing is recommended
        assert published.choose_grid(regions, CT, None, None) == ((512, 512, 512), (1.0, 1.0, 1.0))


def test_one_of_both_keeps_the_field_of_view(published):
    size, spacing = published.choose_grid(["chest"], CT, (256, 256, 128), None)
    assert size == (256, 256, 128) and spacing == pytest.approx((1.368, 1.368, 2.422))
    size, spacing = published.choose_grid(["chest"], CT, None, (1.0, 1.0, 2.5))
    assert spacing == (1.0, 1.0, 2.5) and size == (384, 384, 128)  # 350 x 350 x 310 mm
    assert published.choose_grid(["chest"], CT, (512, 512, 512), (0.7, 0.7, 0.7)) == ((512,) * 3, (0.7,) * 3)


def test_a_model_of_its_own():
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(default_output_size=[128, 128, 96], default_spacing=[3.0, 3.0, 4.0])
    assert pipe.choose_grid(["chest"], CT, None, None) == ((128, 128, 96), (3.0, 3.0, 4.0))
    assert pipe.choose_grid(None, CT, None, (6.0, 6.0, 6.0)) == ((64, 64, 64), (6.0, 6.0, 6.0))
    assert pipe.choose_grid(None, CT, (64, 64, 64), None) == ((64, 64, 64), (6.0, 6.0, 6.0))


def make_mr(version):
    """A tiny pipeline with the rules of a published MR model."""
    pipe = make_pipeline("rflow-ct", with_mask_networks=False)
    pipe.register_to_config(modality="mri", input_rules=MR_RULES, recommended_fovs=MR_FOVS[version])
    return pipe


@pytest.mark.parametrize(
    "version, regions, modality, fov",
    [
        ("rflow-mr", ["head"], "t1", (160, 256, 256)),
        ("rflow-mr", None, "t1", (160, 256, 256)),
        ("rflow-mr", ["chest"], "t1", (174, 200, 200)),
        ("rflow-mr", ["pelvis"], "t2", (170, 170, 90)),
        ("rflow-mr", ["abdomen"], "mri", (380, 309, 288)),
        ("rflow-mr", ["head"], "flair", (200, 250, 250)),
        ("rflow-mr-brain", None, "swi", (230, 230, 145)),
        ("rflow-mr-brain", ["head"], "mri_mra_skull_stripped", (220, 220, 158)),
        ("rflow-mr-brain", None, "mri", (240, 240, 174)),
    ],
)
def test_what_suits_mr(version, regions, modality, fov):
    pipe = make_mr(version)
    size, spacing = pipe.choose_grid(regions, modality_code(modality), None, None)
    check_grid(size, spacing, pipe.size_multiple, MR_RULES)
    assert np.multiply(size, spacing) == pytest.approx(fov)


@pytest.mark.parametrize("request_", [{}, {"output_size": (256, 256, 128)}, {"spacing": (1.0, 1.0, 1.0)}])
@pytest.mark.parametrize("modality, regions", [("adc", None), ("flair", ["pelvis"])])
def test_mr_that_nothing_is_recommended_for(modality, regions, request_):
    pipe = make_mr("rflow-mr")
    with pytest.raises(ValueError, match=r"no recommended field of view for modality \d+( of pelvis)?: give outp"):
        pipe(image_only=True, modality=modality, body_region=regions, **request_)
    grid = {"output_size": (128, 128, 128), "spacing": (1.0, 1.0, 1.0)}
    assert pipe.choose_grid(regions, modality_code(modality), *grid.values()) == tuple(grid.values())


@pytest.mark.parametrize("version", MR_FOVS)
def test_what_suits_mr_is_the_same_after_saving(version, tmp_path):
    """JSON has names in alphabetical order."""
    pipe = make_mr(version)
    pipe.save_config(tmp_path)
    saved = MaisiCTPipeline.load_config(tmp_path)["recommended_fovs"]
    assert saved == MR_FOVS[version] and list(saved) != list(MR_FOVS[version])
    grids = [pipe.choose_grid(None, modality_code(modality), None, None) for modality in ("mri", "t1", "t2")]
    pipe.register_to_config(recommended_fovs=saved)
    assert grids == [pipe.choose_grid(None, modality_code(modality), None, None) for modality in ("mri", "t1", "t2")]


def test_every_mr_recommendation_is_within_the_rules():
    for version, of_version in MR_FOVS.items():
        pipe = make_mr(version)
        for modality, by_word in of_version.items():
            for word in by_word:
                check_grid(*pipe.choose_grid([word], modality_code(modality), None, None), 16, MR_RULES)


def test_an_unusual_field_of_view_of_mr(monkeypatch):
    pipe = make_mr("rflow-mr-brain")

    def stop(*args, **kwargs):
        raise PreparedError

    monkeypatch.setattr(pipe, "prepare_conditions", stop)
    request = {"image_only": True, "modality": "swi", "output_size": (256, 256, 128)}
    usual = "230 x 230 x 145 mm, 140 x 230 x 230 mm, 230 x 155 x 230 mm"
    with pytest.warns(UserWarning, match=f"the field of view of 128 x 128 x 64 mm of size .* meant for, {usual}: "):
        with pytest.raises(PreparedError):
            pipe(**request, spacing=(0.5, 0.5, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(PreparedError):
            pipe(**request, spacing=(0.9, 0.9, 1.2))
        with pytest.raises(PreparedError):
            pipe(image_only=True, modality="swi")


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
    with pytest.warns(UserWarning, match="has seen of chest and abdomen and pelvis"):  # what is between them, too
        with pytest.raises(PreparedError):
            published(**request, body_region=["chest", "pelvis"], spacing=(0.5, 0.5, 1.0))
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
