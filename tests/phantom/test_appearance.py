"""The CTs of phantoms look like CTs: noise, fat, gas and stool, people who differ; calibrated on a real one."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from benchmarks.phantom_calibration import measure, measure_phantoms
from maisi_diffusers.anatomy import BODY, LABELS, load_label_map
from maisi_diffusers.phantom import Subject, make_phantom


def arrays(phantom):
    return np.asarray(phantom.image.dataobj), np.asarray(phantom.labels.dataobj)


@pytest.fixture(scope="module")
def torsos():
    """Of some people, without contrast."""
    grid = {"size": (96, 96, 112), "spacing": (4.0, 4.0, 4.0)}
    return [
        arrays(make_phantom(seed, ["chest", "abdomen"], subject=Subject.draw(seed, phase="none"), **grid))
        for seed in range(20, 24)
    ]


def test_gas_and_stool(torsos):
    shares = []
    for image, labels in torsos:
        colon = image[ndimage.binary_erosion(labels == LABELS["colon"])]
        shares.append((colon < -600).mean())
        solid = colon[colon > -300]
        assert len(solid) > 50 and solid.std() > 40  # neither water nor wall
    assert min(shares) > 0.002 and 0.1 < max(shares) < 0.8


def test_fat_below_the_skin(torsos):
    for image, labels in torsos[1:]:  # the first is lean: 5 mm
        depth = ndimage.distance_transform_edt(labels > 0, sampling=4.0)
        below = (labels == BODY) & (depth > 5) & (depth < 9)
        assert -120 < np.median(image[below]) < -70


def test_edges_are_blurred(torsos):
    """The body shows in the air beside it."""
    for image, labels in torsos:
        beside, near = (ndimage.binary_dilation(labels > 0, iterations=n) for n in (1, 4))
        assert image[beside & (labels == 0)].mean() > image[~near].mean() + 30


def test_lungs_have_vessels(torsos):
    for image, labels in torsos:
        lung = image[ndimage.binary_erosion(labels == LABELS["right lung lower lobe"], iterations=2)]
        assert np.percentile(lung, 99.5) > -650 > np.median(lung)


def test_people_differ():
    subjects = [Subject.draw(seed) for seed in range(40)]
    assert np.std([one.scale[2] for one in subjects]) > 0.02 and np.std([one.scale[0] for one in subjects]) > 0.03
    assert np.std([one.fat for one in subjects]) > 4 and np.std([one.breath for one in subjects]) > 3
    assert {one.sex for one in subjects} == {"male", "female"} and {one.arms for one in subjects} == {"up", "down"}
    grid = {"size": (48, 48, 48), "spacing": (8.0, 8.0, 8.0)}
    medians = []
    for seed in range(6):
        image, labels = arrays(make_phantom(seed, ["abdomen"], subject=Subject.draw(seed, phase="none"), **grid))
        medians.append(np.median(image[labels == LABELS["liver"]]))
    assert 2 < np.std(medians) < 20


def test_a_given_sex_has_its_height_and_fat():
    for seed in range(4):
        male, female = (Subject.draw(seed, sex=sex) for sex in ("male", "female"))
        assert female.scale[2] < male.scale[2] and female.fat > male.fat
        assert Subject.draw(seed) in (male, female)


def test_as_a_real_ct(torso_ct, torso_labels):
    """Soft organs, noise and its correlation are those of the CT that phantoms are calibrated on."""
    real = measure(
        np.asarray(nib.load(torso_ct).dataobj),
        np.asarray(load_label_map(torso_labels, "totalsegmentator").dataobj),
    )
    phantoms = measure_phantoms(3, (3.0, 3.0, 3.0))
    for organ in ("liver", "spleen", "aorta"):
        median, _, noise, correlation = np.mean([one[organ] for one in phantoms], axis=0)
        assert median == pytest.approx(real[organ][0], abs=20), organ
        assert noise == pytest.approx(real[organ][2], abs=6), organ
        assert 0.15 < correlation < 0.45, organ  # of the real ones 0.08 to 0.25; white noise has 0
