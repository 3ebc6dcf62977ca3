"""A real segmentation and its CT go through the pipeline."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from maisi_diffusers.anatomy import LABELS, load_label_map
from maisi_diffusers.imaging import resample_like, spacing_of
from tests.tiny import MULTIPLE, make_pipeline, seeded

FIVE_ML = 5000.0


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline("rflow-ct", with_mask_networks=False)


@pytest.fixture(scope="module")
def generate(pipe, torso_ct):
    def generate(mask, **kwargs):
        arguments = {"mask_vocabulary": "totalsegmentator", "body_image": torso_ct, "num_inference_steps": 1}
        output = pipe(mask=mask, generator=seeded(), **(arguments | kwargs))
        return output.images[0], output.labels[0]

    return generate


@pytest.fixture(scope="module")
def torso(generate, torso_labels):
    return generate(torso_labels)


def dice(expected: nib.Nifti1Image, found: nib.Nifti1Image) -> dict[int, float]:
    """Dice of every organ of more than 5 ml; the second is brought onto the first's grid."""
    a = np.asarray(expected.dataobj)
    b = np.asarray(resample_like(found, expected, order=0, fill=0).dataobj)
    volume = np.prod(spacing_of(expected))
    return {
        label: 2 * ((a == label) & (b == label)).sum() / ((a == label).sum() + (b == label).sum())
        for label in np.unique(a)
        if label and (a == label).sum() * volume > FIVE_ML
    }


def test_grid_labels_and_air(torso, torso_labels):
    source = nib.load(torso_labels)
    image, labels = torso
    assert image.shape == labels.shape == (120, 104, 112)
    assert all(size % MULTIPLE == 0 for size in image.shape)
    np.testing.assert_allclose(np.multiply(image.shape, spacing_of(image)), np.multiply(source.shape, 3.0))
    np.testing.assert_allclose(image.affine, labels.affine)
    centre = [nib.affines.apply_affine(i.affine, (np.array(i.shape) - 1) / 2) for i in (image, source)]
    np.testing.assert_allclose(centre[0], centre[1], atol=1e-4)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")

    array = np.asarray(labels.dataobj)
    assert len(np.unique(array)) == 63  # 61 organs of the file, air, and the body
    assert 200 in array and 0 in array
    hu = np.asarray(image.dataobj)
    assert (hu[array == 0] == -1000).all()
    assert hu[array > 0].std() > 10
    assert 0.3 < (array > 0).mean() < 0.8


def test_lps(generate, torso, torso_labels):
    source = nib.load(torso_labels)
    lps = source.as_reoriented(nib.orientations.axcodes2ornt(("L", "P", "S")))
    assert nib.aff2axcodes(lps.affine) == ("L", "P", "S")
    image, labels = generate(lps)
    assert min(dice(torso[1], labels).values()) >= 0.95
    np.testing.assert_allclose(labels.affine, torso[1].affine)
    assert np.array_equal(image.dataobj, torso[0].dataobj)


def test_rotated_affine(generate, torso, torso_labels, torso_ct):
    """The patient lies askew in the scanner: the same voxels, and an affine that says so."""
    angle = np.deg2rad(12)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turned = [
        nib.Nifti1Image(np.asarray(i.dataobj), rotation @ i.affine) for i in map(nib.load, (torso_labels, torso_ct))
    ]
    _, labels = generate(turned[0], body_image=turned[1])
    np.testing.assert_allclose(labels.affine, rotation @ torso[1].affine, atol=1e-4)
    unturned = nib.Nifti1Image(np.asarray(labels.dataobj), torso[1].affine)
    assert min(dice(torso[1], unturned).values()) >= 0.95


def test_4_mm_slices(generate, torso, torso_labels):
    """
    Saved with thicker slices, by the nearest slice. On the slices that file has, every organ overlaps the first. One
    slice of 3 mm in four is lost in it, so that between them thin organs cannot overlap by more, whatever is done
    afterwards; those of more than 70 ml do, and all on average.
    """
    source = nib.load(torso_labels)
    data = np.asarray(source.dataobj)
    nearest = np.floor((np.arange(84) + 0.5) * 4 / 3).astype(int)
    affine = source.affine.copy()
    affine[2, 2] = 4.0
    affine[2, 3] += 0.5  # the first slice begins where it did
    thick = nib.Nifti1Image(data[:, :, nearest], affine)
    grid = {"output_size": torso[1].shape, "spacing": spacing_of(torso[1])}
    _, labels = generate(thick, **grid)
    scores = dice(resample_like(torso[1], thick, order=0, fill=0), labels)
    assert len(scores) > 45 and min(scores.values()) >= 0.95

    scores = dice(torso[1], labels)
    volumes = {label: (np.asarray(torso[1].dataobj) == label).sum() * 27 for label in scores}
    assert np.average(list(scores.values())) >= 0.95
    assert min(score for label, score in scores.items() if volumes[label] > 70_000) >= 0.95
    assert min(scores.values()) > 0.85


def test_restore_grid(generate, torso_labels):
    """Image and labels back on the user's own grid, organ for organ where they were."""
    source = nib.load(torso_labels).as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "R")))
    image, labels = generate(source, restore_grid=True)
    assert image.shape == labels.shape == source.shape
    np.testing.assert_allclose(image.affine, source.affine)
    assert image.get_data_dtype() == np.int16 and labels.get_data_dtype() == np.uint8
    assert "synthetic" in image.header["descrip"].item().decode()
    scores = dice(load_label_map(source, "totalsegmentator"), labels)
    assert np.mean(list(scores.values())) > 0.95 and min(scores.values()) > 0.85
    assert (np.asarray(image.dataobj)[np.asarray(labels.dataobj) == 0] == -1000).all()


def test_a_tumor_in_the_real_ct(pipe, torso_ct, torso_labels):
    """All of the CT but for the tumor and 6 mm around it stays the same to the voxel."""
    image, labels = nib.load(torso_ct), load_label_map(torso_labels, "totalsegmentator")
    array = np.asarray(labels.dataobj).copy()
    liver = np.argwhere(array == LABELS["liver"])
    middle = liver[len(liver) // 2]
    near = np.linalg.norm((np.indices(array.shape).T - middle).T * 3.0, axis=0) < 18
    array[near & (array == LABELS["liver"])] = LABELS["hepatic tumor"]
    mask = nib.Nifti1Image(array, labels.affine)
    out = pipe(image=torso_ct, mask=mask, repaint_labels=["hepatic tumor"], num_inference_steps=1, generator=seeded())
    far = ndimage.distance_transform_edt(array != LABELS["hepatic tumor"], sampling=spacing_of(image)) >= 6
    changed = np.asarray(out.images[0].dataobj) != np.asarray(image.dataobj)
    assert changed[array == LABELS["hepatic tumor"]].any() and not changed[far].any()
    made = np.asarray(out.labels[0].dataobj)
    assert np.array_equal(made[array > 0], array[array > 0]) and set(np.unique(made[array == 0])) == {0, 200}
    np.testing.assert_allclose(out.images[0].affine, image.affine)


def test_without_ct_the_body_is_a_guess(pipe, torso_labels):
    with pytest.warns(UserWarning, match="guess"):
        output = pipe(
            mask=torso_labels,
            mask_vocabulary="totalsegmentator",
            num_inference_steps=1,
            output_size=(64, 64, 64),
            generator=seeded(),
        )
    assert 200 in np.asarray(output.labels[0].dataobj)


def test_lost_labels_are_named(pipe, torso_ct, torso_labels):
    with pytest.warns(UserWarning, match="vertebrae T11.*output_size"):
        pipe(
            mask=torso_labels,
            mask_vocabulary="totalsegmentator",
            body_image=torso_ct,
            num_inference_steps=1,
            output_size=(24, 24, 24),
            generator=seeded(),
        )


def test_another_ct_is_noticed(generate, torso_labels, torso_ct):
    ct = nib.load(torso_ct)
    shifted = ct.affine.copy()
    shifted[0, 3] += 200
    with pytest.warns(UserWarning, match="covers it"):
        generate(torso_labels, body_image=nib.Nifti1Image(np.asarray(ct.dataobj).astype(np.int16), shifted))
    raised = nib.Nifti1Image(np.asarray(ct.dataobj).clip(-1024).astype(np.int16) + np.int16(1024), ct.affine)
    with pytest.warns(UserWarning, match="in HU"):
        generate(torso_labels, body_image=raised)


def test_another_vocabulary_is_noticed(generate, torso_labels):
    with pytest.warns(UserWarning, match="'totalsegmentator'"):
        generate(torso_labels, mask_vocabulary="maisi")
