"""An image whose organs have the wrong HU is made again, with fresh noise, and not without end."""

import json

import numpy as np
import pytest
import torch

from tests.tiny import SIZE, make_label_map, make_pipeline, seeded

PASSED = {"passed": True, "organs": {}}
FAILED = {"passed": False, "organs": {"liver": {"median": 400.0, "low": -22, "high": 162, "passed": False}}}


@pytest.fixture
def pipe(monkeypatch):
    """A pipeline; `pipe.verdicts` are what the quality check will find, and `pipe.noises` what it sampled from."""
    pipe = make_pipeline(with_mask_networks=False)
    verdicts, noises = [], []
    sample = pipe.sample

    def remember(latents, *args):
        noises.append(latents.clone())
        return sample(latents, *args)

    monkeypatch.setattr(pipe, "sample", remember)
    monkeypatch.setattr(pipe, "check_quality", lambda image, labels, modality: verdicts.pop(0) if verdicts else PASSED)
    object.__setattr__(pipe, "verdicts", verdicts)
    object.__setattr__(pipe, "noises", noises)
    return pipe


def call(pipe, verdicts=(), **kwargs):
    pipe.verdicts[:] = verdicts
    return pipe(mask=make_label_map(), **{"output_type": "np", "generator": seeded(), **kwargs})


def test_passed_at_once(pipe):
    out = call(pipe, [PASSED])
    assert len(pipe.noises) == 1 and out.reports == [{"label_map": None, "quality": PASSED, "attempts": 1}]


def test_passed_the_second_time(pipe):
    out = call(pipe, [FAILED, PASSED])
    assert out.reports[0]["quality"] == PASSED and out.reports[0]["attempts"] == 2
    assert len(pipe.noises) == 2 and not torch.equal(*pipe.noises)
    # It is the image of the second noise.
    again = call(pipe, latents=pipe.noises[1])
    np.testing.assert_array_equal(out.images, again.images)


def test_never_passed(pipe):
    with pytest.warns(
        UserWarning, match="image 0: the median of liver is 400 HU, .* in the last of 3 attempts; another"
    ):
        out = call(pipe, [FAILED] * 9)
    assert out.reports == [{"label_map": None, "quality": FAILED, "attempts": 3}] and len(pipe.noises) == 3
    np.testing.assert_array_equal(out.images, call(pipe, latents=pipe.noises[2]).images)


@pytest.mark.parametrize("retries, attempts", [(0, 1), (1, 2), (4, 5)])
def test_number_of_retries(pipe, retries, attempts):
    with pytest.warns(UserWarning, match="the median of liver"):
        out = call(pipe, [FAILED] * 9, quality_retries=retries)
    assert out.reports[0]["attempts"] == attempts == len(pipe.noises)


@pytest.mark.parametrize("generator", ["one", "one each"])
def test_only_those_that_failed(pipe, generator):
    def generators():
        return seeded(1) if generator == "one" else [seeded(i) for i in range(3)]

    first = call(pipe, num_images=3, generator=generators())
    out = call(pipe, [PASSED, FAILED, PASSED, PASSED], num_images=3, generator=generators())
    assert [report["attempts"] for report in out.reports] == [1, 2, 1]
    assert [len(noise) for noise in pipe.noises] == [3, 3, 1]
    for i in (0, 2):
        np.testing.assert_array_equal(out.images[i], first.images[i])
    assert not np.array_equal(out.images[1], first.images[1])
    np.testing.assert_array_equal(out.images[1], call(pipe, latents=pipe.noises[2]).images[0])


def test_seeds(pipe):
    images = [call(pipe, [FAILED, PASSED]).images for _ in range(2)]
    np.testing.assert_array_equal(*images)


def test_what_is_not_made_again(pipe):
    noise = torch.randn(1, 4, *(n // 4 for n in SIZE), generator=seeded())
    with pytest.warns(UserWarning, match="the median of liver"):
        assert call(pipe, [FAILED] * 3, latents=noise).reports[0]["attempts"] == 1
    out = call(pipe, [FAILED] * 3, output_type="latent")
    assert out.reports == [{"label_map": None, "quality": None, "attempts": 1}]
    out = pipe(image_only=True, output_size=SIZE, generator=seeded(), output_type="np")
    assert out.reports == [{"label_map": None, "quality": None, "attempts": 1}]


def test_interrupted(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    with pytest.warns(UserWarning, match="the median of liver"):
        assert call(pipe, [FAILED] * 3, callback_on_step_end=stop).reports[0]["attempts"] == 1


def test_with_guidance(pipe):
    out = call(pipe, [PASSED, FAILED], num_images=2, guidance_scale=2.0)
    assert [report["attempts"] for report in out.reports] == [1, 2]


def test_with_thresholds_of_the_model():
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(quality_thresholds={"liver": [5000, 6000]})
    with pytest.warns(UserWarning, match="which should be 5000 to 6000; another seed"):
        out = pipe(mask=make_label_map(), quality_retries=0, generator=seeded())
    assert out.reports[0]["quality"]["organs"]["liver"]["high"] == 6000
    json.dumps(out.reports)


def test_without_a_check(pipe, recwarn):
    out = call(pipe, [FAILED] * 3, quality_check=False)
    assert out.reports == [{"label_map": None, "quality": None, "attempts": 1}] and len(pipe.verdicts) == 3
    assert not [one for one in recwarn if "median" in str(one.message)]


@pytest.mark.parametrize("thresholds", [{"livr": [0, 100]}, {"liver": [100, 0]}, {"liver": 5}])
def test_wrong_thresholds_of_the_model(thresholds, monkeypatch):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(quality_thresholds=thresholds)
    monkeypatch.setattr(pipe, "sample", None)  # nothing is made before it is known
    with pytest.raises(ValueError, match="'livr'|The median of 'liver' cannot have range"):
        pipe(mask=make_label_map(), generator=seeded())


@pytest.mark.parametrize("wrong", [-1, 1.5, "2", None])
def test_bad_number(pipe, wrong):
    with pytest.raises(ValueError, match=f"quality_retries={wrong!r} is not allowed: give a whole number, 0 or more"):
        call(pipe, quality_retries=wrong)
