"""A given CT is changed where it is said, and nowhere else."""

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from scipy import ndimage

from maisi_diffusers.pipelines.editing import first_step
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded

AFFINE = np.diag([*SPACING, 1.0])


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(with_mask_networks=False)


@pytest.fixture(scope="module")
def ct():
    """A CT of noise, beyond the range of the VAE at some voxels."""
    hu = np.random.default_rng(0).normal(0, 300, SIZE)
    hu[12, 8, 16] = 2500
    return nib.Nifti1Image(hu.astype(np.int16), AFFINE)


def edit(pipe, ct, mask=None, **kwargs):
    mask = make_label_map() if mask is None else mask
    return pipe(image=ct, mask=mask, **{"generator": seeded(), **kwargs})


def test_repainted_labels_and_nothing_else(pipe, ct):
    feather = 5.0
    out = edit(pipe, ct, repaint_labels=[26], feather=feather)
    labels, made = np.asarray(make_label_map().dataobj), np.asarray(out.images[0].dataobj)
    distance = ndimage.distance_transform_edt(labels != 26, sampling=SPACING)
    changed = made != np.asarray(ct.dataobj)
    assert not changed[distance >= feather].any()
    assert changed[labels == 26].mean() > 0.5 and changed[(distance > 0) & (distance < 4)].any()
    assert out.images[0].get_data_dtype() == np.int16 and np.allclose(out.images[0].affine, AFFINE)
    assert np.array_equal(out.labels[0].dataobj, labels)


def test_without_feather_the_labels_alone(pipe, ct):
    out = edit(pipe, ct, repaint_labels=["hepatic tumor"], feather=0)
    changed = np.asarray(out.images[0].dataobj) != np.asarray(ct.dataobj)
    assert changed.any() and not changed[np.asarray(make_label_map().dataobj) != 26].any()


def test_strength(pipe, ct):
    own = np.asarray(ct.dataobj)
    for kwargs in ({}, {"repaint_labels": [26]}):
        out = edit(pipe, ct, strength=0, **kwargs)
        assert np.array_equal(out.images[0].dataobj, own) and np.array_equal(
            out.labels[0].dataobj, make_label_map().dataobj
        )
    pipe.register_to_config(num_inference_steps=8)
    inside = np.asarray(make_label_map().dataobj) > 0
    images = [np.asarray(edit(pipe, ct, strength=s).images[0].dataobj, dtype=float)[inside] for s in (0.125, 0.5, 1.0)]
    intensities = torch.from_numpy((own.clip(-1000, 1000) + 1000).astype(np.float32) / 2000)[None, None]
    with torch.no_grad():
        latents = pipe.vae.encode(intensities).latent_dist.mode() * pipe.vae.config.scaling_factor
        reconstruction = pipe.decode(latents, 1, None)[0, 0].numpy()[inside]
    away = [np.abs(image - reconstruction).mean() for image in images]
    assert away[0] < away[1] < away[2]
    # All of it: as without the CT.
    from_noise = pipe(mask=make_label_map(), generator=seeded()).images[0]
    assert np.array_equal(images[2], np.asarray(from_noise.dataobj, dtype=float)[inside])
    pipe.register_to_config(num_inference_steps=2)


def test_beyond_the_field_of_view_it_stays(pipe, ct):
    small = {"output_size": (16, 16, 16), "spacing": SPACING}
    made, own = (np.asarray(one.dataobj) for one in (edit(pipe, ct, **small).images[0], ct))
    same = made == own
    beyond = np.ones(SIZE, dtype=bool)
    beyond[4:20, :, 8:24] = False
    assert same[beyond].all() and not same[5:19, 1:15, 9:23].all()
    labels = np.array(make_label_map().dataobj)
    labels[2:22, 8, 16] = 26
    with pytest.raises(ValueError, match=r"hepatic tumor lies in part beyond the field of view, \(16, 16, 16\)"):
        edit(pipe, ct, nib.Nifti1Image(labels, AFFINE), repaint_labels=[26], **small)


def test_steps_that_are_left_out():
    assert [first_step(s, 10) for s in (0, 0.01, 0.1, 0.5, 0.99, 1)] == [10, 9, 9, 5, 0, 0]
    assert first_step(0.5, 1) == 0


def test_number_of_steps(pipe, ct):
    edit(pipe, ct, strength=0.5, num_inference_steps=6)
    assert pipe.num_timesteps == 3


def test_seeds(pipe, ct):
    first, same, other = (
        np.asarray(edit(pipe, ct, repaint_labels=[26], generator=seeded(seed)).images[0].dataobj) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert len(edit(pipe, ct, repaint_labels=[26], num_images=2).images) == 2


def test_any_orientation_and_grid(pipe, ct):
    """The CT comes back as it was given: turned, and on a grid that the model does not have."""
    mask = make_label_map((22, 18, 30))
    ct = nib.Nifti1Image(np.random.default_rng(0).normal(0, 300, mask.shape).astype(np.int16), mask.affine)
    turn = nib.orientations.axcodes2ornt("SLP")
    own = ct.as_reoriented(turn)
    turned = edit(pipe, own, mask.as_reoriented(turn), repaint_labels=[26])
    straight = edit(pipe, ct, mask, repaint_labels=[26])
    image = turned.images[0]
    assert image.shape == own.shape != ct.shape and np.allclose(image.affine, own.affine)
    for out, given in ((turned, mask.as_reoriented(turn)), (straight, mask)):
        assert np.array_equal(out.labels[0].dataobj, given.dataobj) and np.allclose(out.labels[0].affine, given.affine)
    assert np.array_equal(nib.as_closest_canonical(image).dataobj, straight.images[0].dataobj)
    far = ndimage.distance_transform_edt(
        np.asarray(mask.as_reoriented(turn).dataobj) != 26, sampling=nib.affines.voxel_sizes(image.affine)
    )
    assert np.array_equal(np.asarray(image.dataobj)[far >= 6], np.asarray(own.dataobj)[far >= 6])
    assert (np.asarray(image.dataobj) != np.asarray(own.dataobj)).any()


def test_the_body_is_told_from_the_ct(pipe):
    """A mask without label 200: the CT is what it was drawn on."""
    mask = make_label_map()
    labels = np.asarray(mask.dataobj)
    hu = np.where(labels > 0, 40, -1000).astype(np.int16)
    bare = nib.Nifti1Image(np.where(labels == 200, 0, labels).astype(np.uint8), AFFINE)
    out = edit(pipe, nib.Nifti1Image(hu, AFFINE), bare)
    assert 200 in np.asarray(out.labels[0].dataobj)


@pytest.mark.parametrize("solver", [FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_other_solvers_go_where_the_models_own_goes(ct, solver, strength):
    pipe = make_pipeline(with_mask_networks=False)
    found = []
    for scheduler in (pipe.scheduler, solver.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        out = edit(pipe, ct, repaint_labels=[26], strength=strength, num_inference_steps=40)
        found.append(np.asarray(out.images[0].dataobj, dtype=float) - np.asarray(ct.dataobj))
    own, other = found
    assert (own != 0).any() and np.abs(other - own).mean() < 0.25 * np.abs(own).mean()


def test_the_outline_of_mr_is_not_told_by_it(pipe):
    """Its air is not below -800 HU."""
    mask = make_label_map()
    labels = np.asarray(mask.dataobj)
    bare = nib.Nifti1Image(np.where(labels == 200, 0, labels).astype(np.uint8), AFFINE)
    image = nib.Nifti1Image(np.where(labels > 0, 400, 0).astype(np.int16), AFFINE)
    with pytest.warns(UserWarning, match="a guess from the hull of the organs"):
        out = edit(pipe, image, bare, modality="t1")
    assert (np.asarray(out.labels[0].dataobj) == 0).any()


def test_a_check_of_what_is_painted_alone(ct, recwarn):
    """The CT's own liver is not what the model can be blamed for."""
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(quality_thresholds={"liver": [5000, 6000], "hepatic tumor": [-2000, 4000]})
    (report,) = edit(pipe, ct, repaint_labels=[26]).reports
    assert report["attempts"] == 1 and report["quality"]["organs"].keys() == {"hepatic tumor"}
    assert not [warning for warning in recwarn if "the median of" in str(warning.message)]


def test_nothing_is_made_where_nothing_changes(ct, monkeypatch):
    pipe = make_pipeline(with_mask_networks=False)
    monkeypatch.setattr(pipe.vae, "decode", None)
    assert edit(pipe, ct, repaint_labels=[26], strength=0).reports[0]["attempts"] == 0


def test_on_the_device_of_the_pipeline(pipe, ct, monkeypatch):
    """Not on the VAE's, which offloading leaves elsewhere between its calls."""
    expected = edit(pipe, ct, repaint_labels=[26]).images[0]
    monkeypatch.setattr(type(pipe.vae), "device", property(lambda vae: torch.device("meta")))
    assert np.array_equal(edit(pipe, ct, repaint_labels=[26]).images[0].dataobj, expected.dataobj)


def test_labels_that_are_nowhere(pipe, ct):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.controlnet.add_classes({"kidney tumor": 129}, {"kidney tumor": ["left kidney"]})
    with pytest.raises(ValueError, match="the mask has no kidney tumor; draw it in the mask first"):
        edit(pipe, ct, repaint_labels=["kidney tumor"])
    labels = np.asarray(make_label_map().dataobj).copy()
    labels[labels == 26] = 1
    labels[9, 7, 13] = 26
    mask = nib.Nifti1Image(labels, AFFINE)
    with pytest.raises(ValueError, match="hepatic tumor has no voxel left on the model's grid .* a finer spacing"):
        edit(pipe, ct, mask, repaint_labels=[26], output_size=(8, 8, 8), spacing=(6.0, 4.0, 12.0))


def test_ddpm(ct):
    pipe = make_pipeline("ddpm-ct", with_mask_networks=False)
    assert isinstance(pipe.scheduler, DDPMScheduler)
    out = edit(pipe, ct, repaint_labels=[26], strength=0.5, num_inference_steps=4)
    changed = np.asarray(out.images[0].dataobj) != np.asarray(ct.dataobj)
    assert changed.any() and changed.mean() < 0.2 and pipe.num_timesteps == 2
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="cannot be changed with EulerDiscreteScheduler"):
        edit(pipe, ct, repaint_labels=[26])


WRONG = {
    "no mask": ({"mask": None, "image_only": True}, "there is none: give mask="),
    "no image": ({"image": None, "repaint_labels": [26]}, "there is none: give both"),
    "strength of nothing": ({"image": None, "strength": 0.5}, "strength says how image is changed"),
    "feather of nothing": ({"image": None, "feather": 3.0}, "feather says how image is changed"),
    "feather around nothing": ({"feather": 3.0}, "feather is around repaint_labels"),
    "negative feather": ({"repaint_labels": [26], "feather": -5.0}, "feather=-5.0 is not allowed"),
    "endless feather": ({"repaint_labels": [26], "feather": float("inf")}, "feather=inf is not allowed"),
    "strength": ({"strength": 1.5}, "strength=1.5 is not allowed"),
    "strength in words": ({"strength": "0.5"}, "strength='0.5' is not allowed"),
    "feather in words": ({"repaint_labels": [26], "feather": "5"}, "feather='5' is not allowed"),
    "no labels": ({"repaint_labels": []}, "repaint_labels=\\[\\] is not allowed"),
    "no list": ({"repaint_labels": 26}, "repaint_labels=26 is not allowed"),
    "a name that is none": ({"repaint_labels": ["tumour"]}, "tumour"),
    "not in the mask": ({"repaint_labels": ["spleen"]}, "the mask has no spleen; draw it"),
    "output": ({"output_type": "np"}, "on its own grid"),
    "grid": ({"mask": make_label_map((16, 16, 32))}, "their affines differ: give a label map that is drawn on"),
    "moved": ({"mask": nib.Nifti1Image(make_label_map().dataobj, AFFINE + np.eye(4, k=3))}, "affines differ"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(pipe, ct, case):
    kwargs, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": ct, "mask": make_label_map(), "generator": seeded()} | kwargs)


def test_missing_file(pipe):
    with pytest.raises(FileNotFoundError, match="nowhere.nii.gz"):
        edit(pipe, "nowhere.nii.gz")
