"""Label maps from anatomy sizes, by DDPM and by rectified flow."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from maisi_diffusers import MaisiCTPipeline, MaisiMaskPipeline, MaisiRFlowScheduler
from maisi_diffusers.anatomy import CONTROLLABLE_ANATOMY, LABELS, MASK_VAE_LABELS, clean_up, fit_tumor, remove_crumbs
from tests.tiny import SPACING, make_pipeline, seeded

SIZES = [0.5, 0.6, -1.0, 0.3, 0.4, -1.0, -1.0, 0.2, -1.0, -1.0]


def make_mask_pipeline(kind, **config):
    networks = make_pipeline()
    scheduler = networks.mask_scheduler if kind == "ddpm" else MaisiRFlowScheduler()
    pipe = MaisiMaskPipeline(networks.mask_vae, networks.mask_unet, scheduler, (4, 4, 6), (6.0, 6.0, 4.0), **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["ddpm", "rflow"])
def pipe(request):
    return make_mask_pipeline(request.param)


def call(pipe, seed=0, output_type="np", anatomy_size=SIZES, **kwargs):
    """Label maps as they are decoded: of random weights nothing would be left by a clean-up."""
    arguments = {"anatomy_size": anatomy_size, "output_type": output_type, "clean_up": False} | kwargs
    return pipe(**arguments, generator=seeded(seed)).masks


def test_output(pipe):
    (mask,) = call(pipe, output_type="nifti")
    assert mask.shape == (16, 16, 24) and mask.get_data_dtype() == np.uint8
    np.testing.assert_allclose(mask.affine, np.diag([6, 6, 4, 1]))
    assert set(np.unique(mask.dataobj)) <= set(MASK_VAE_LABELS)


def test_seeds(pipe):
    assert np.array_equal(call(pipe), call(pipe))
    assert not np.array_equal(call(pipe), call(pipe, seed=1))
    assert not torch.equal(
        call(pipe, output_type="latent"), call(pipe, output_type="latent", anatomy_size=[0.9] * 5 + [-1] * 5)
    )


def test_label_maps_are_the_largest_logits(pipe):
    latents = call(pipe, output_type="latent", num_images=2)
    with torch.no_grad():
        logits = pipe.mask_vae.decode(latents / pipe.mask_vae.config.scaling_factor).sample
    expected = torch.tensor(MASK_VAE_LABELS)[logits.argmax(1)]
    assert np.array_equal(call(pipe, num_images=2), expected)


def decodes(monkeypatch, pipe, labels):
    """Have a pipeline decode every latent to this label map."""
    monkeypatch.setattr(pipe, "decode", lambda latents: torch.from_numpy(np.stack([[labels]] * len(latents))))


@pytest.fixture
def labels():
    """A body with a liver, a tumor in it, and a stray piece of each, that of the tumor a crumb."""
    labels = np.zeros((16, 16, 24), dtype=np.uint8)
    labels[1:15, 1:15, 1:23] = 200
    labels[3:9, 3:9, 3:9] = LABELS["liver"]
    labels[5:8, 5:8, 5:8] = LABELS["hepatic tumor"]
    labels[12:14, 12:14, 12:15] = LABELS["liver"]
    labels[12, 12, 20] = LABELS["hepatic tumor"]
    return labels


@pytest.mark.parametrize("output_type", ["nifti", "np", "pt"])
def test_clean_up_and_report(monkeypatch, labels, output_type):
    ranges = dict.fromkeys(CONTROLLABLE_ANATOMY, [1.0, 64.0])
    pipe = make_mask_pipeline("rflow", mask_size_ranges=ranges, mask_num_inference_steps=1)
    decodes(monkeypatch, pipe, labels)
    sizes = [("liver", 0.4), ("hepatic tumor", 0.3), ("stomach", 0.5)]
    out = pipe(sizes, num_images=2, generator=seeded(), output_type=output_type)
    masks = [np.asarray(mask.dataobj if output_type == "nifti" else mask).squeeze() for mask in out.masks]
    assert len(masks) == len(out.reports) == 2
    without, crumbs = remove_crumbs(labels)
    clean, report = clean_up(without, LABELS["hepatic tumor"])
    fitted = fit_tumor(clean, LABELS["hepatic tumor"], 1.9**3, pipe.config.mask_spacing)
    assert all(mask.dtype == np.uint8 and np.array_equal(mask, fitted) for mask in masks)
    assert out.reports[0]["clean_up"] == {"crumbs": crumbs, **asdict(report)}
    assert crumbs == 1 and report.organ_pieces == {LABELS["liver"]: 12}
    voxel = 6 * 6 * 4 / 1000
    anatomy = out.reports[0]["anatomy"]
    drawn = pytest.approx(27 * voxel, abs=0.01)
    tumor = {"asked": 0.3, "ml": pytest.approx(48 * voxel, abs=0.01), "reached": pytest.approx(0.3, abs=0.01)}
    assert anatomy["hepatic tumor"] == {**tumor, "drawn_ml": drawn}
    assert anatomy["liver"]["ml"] == pytest.approx(168 * voxel, abs=0.01)
    assert anatomy["stomach"] == {"asked": 0.5, "ml": 0.0, "reached": -1.0}
    json.dumps(out.reports)


def test_a_tumor_that_was_not_drawn(monkeypatch, labels):
    """Is where its generator says, one for each label map or one for all."""
    labels[labels == LABELS["hepatic tumor"]] = LABELS["liver"]
    ranges = dict.fromkeys(CONTROLLABLE_ANATOMY, [0.1, 8.0])
    pipe = make_mask_pipeline("rflow", mask_size_ranges=ranges, mask_num_inference_steps=1)
    decodes(monkeypatch, pipe, labels)
    sizes = [("hepatic tumor", 0.1)]
    out = pipe(sizes, num_images=3, generator=[seeded(0), seeded(1), seeded(0)], output_type="np")
    tumors = out.masks == LABELS["hepatic tumor"]
    assert tumors.any((1, 2, 3)).all() and np.array_equal(tumors[0], tumors[2])
    assert not np.array_equal(tumors[0], tumors[1])
    assert out.reports[0]["anatomy"]["hepatic tumor"]["drawn_ml"] == 0
    assert np.array_equal(pipe(sizes, generator=seeded(0), output_type="np").masks[0], out.masks[0])


def test_sizes_that_are_not_known(monkeypatch, labels):
    """Of a model that does not say how sizes are measured, tumors are as drawn."""
    pipe = make_mask_pipeline("rflow", mask_num_inference_steps=1)
    decodes(monkeypatch, pipe, labels)
    out = pipe([("hepatic tumor", 0.9)], generator=seeded(), output_type="np")
    assert np.array_equal(out.masks[0], clean_up(remove_crumbs(labels)[0], LABELS["hepatic tumor"])[0])
    assert out.reports[0]["anatomy"]["hepatic tumor"].keys() == {"asked", "ml"}


def test_a_tumor_not_asked_for_goes(monkeypatch, labels):
    pipe = make_mask_pipeline("rflow", mask_num_inference_steps=1)
    decodes(monkeypatch, pipe, labels)
    out = pipe([("liver", 0.4)], generator=seeded(), output_type="np")
    assert LABELS["hepatic tumor"] not in out.masks
    assert set(out.reports[0]["anatomy"]["liver"]) == {"asked", "ml"}  # how sizes are measured is not known


def test_without_clean_up(monkeypatch, labels):
    pipe = make_mask_pipeline("rflow", mask_num_inference_steps=1)
    decodes(monkeypatch, pipe, labels)
    out = pipe([("liver", 0.4)], clean_up=False, generator=seeded(), output_type="np")
    assert np.array_equal(out.masks[0], labels) and out.reports[0]["clean_up"] is None


@pytest.mark.parametrize(
    ("kind", "config", "steps"),
    [
        ("ddpm", {}, 3),  # as many as it was trained with
        ("ddpm", {"mask_num_inference_steps": 2}, 2),
        ("rflow", {}, 30),
        ("rflow", {"mask_num_inference_steps": 4}, 4),
    ],
)
def test_number_of_steps(kind, config, steps):
    pipe = make_mask_pipeline(kind, **config)
    call(pipe, output_type="latent")
    assert pipe.num_timesteps == steps
    call(pipe, output_type="latent", num_inference_steps=1)
    assert pipe.num_timesteps == 1


def test_rectified_flow_is_integrated():
    """One step: the noise and the velocity there."""
    pipe = make_mask_pipeline("rflow")
    noise = torch.randn(1, 4, 4, 4, 6, generator=seeded())
    with torch.no_grad():
        velocity = pipe.mask_unet(noise, torch.tensor(1000.0), encoder_hidden_states=torch.tensor([[SIZES]])).sample
    latents = call(pipe, output_type="latent", num_inference_steps=1)
    torch.testing.assert_close(latents, noise + velocity, rtol=1e-4, atol=1e-4)


def test_flow_solvers_of_diffusers():
    pipe = make_mask_pipeline("rflow")
    expected = call(pipe, output_type="latent", num_inference_steps=5)
    for solver in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler):
        pipe.mask_scheduler = solver.from_config(pipe.mask_scheduler.config)
        latents = call(pipe, output_type="latent", num_inference_steps=5)
        assert (latents - expected).std() < (1e-4 if solver is FlowMatchEulerDiscreteScheduler else 0.5)


def test_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "model_index.json").read_text())
    kind = "epsilon" if isinstance(pipe.mask_scheduler, DDPMScheduler) else "flow_prediction"
    assert config["mask_prediction_type"] == kind and config["mask_num_inference_steps"] is None
    for loader in (MaisiMaskPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is MaisiMaskPipeline and type(loaded.mask_scheduler) is type(pipe.mask_scheduler)
        assert np.array_equal(call(loaded), call(pipe))


@pytest.mark.parametrize("kind", ["ddpm", "rflow"])
def test_in_a_ct_pipeline(kind, tmp_path):
    """It carries the mask model's settings through saving, and its label maps are those of the mask pipeline."""
    components = make_pipeline().components | make_mask_pipeline(kind).components
    MaisiCTPipeline(
        **components, mask_latent_size=(4, 4, 4), mask_spacing=SPACING, mask_num_inference_steps=2
    ).save_pretrained(tmp_path)
    pipe = MaisiCTPipeline.from_pretrained(tmp_path)
    masks = MaisiMaskPipeline.from_pipe(pipe)
    for one in (pipe, masks):
        one.set_progress_bar_config(disable=True)
        assert one.config.mask_prediction_type == ("epsilon" if kind == "ddpm" else "flow_prediction")
    (mask,) = call(masks, clean_up=True)
    assert masks.num_timesteps == 2
    (made,), reports = pipe.generate_masks(None, SIZES, 1, seeded(), mask.shape, SPACING)
    assert len(reports) == 1
    assert np.array_equal(made.dataobj, mask)


def test_scheduler_of_the_other_kind(tmp_path):
    """Before any network runs, whatever was put in the place of the model's own."""
    pipe = make_mask_pipeline("rflow")
    pipe.mask_unet.forward = None
    pipe.mask_scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="DDPMScheduler cannot sample from a model with prediction_type='flow_pred"):
        call(pipe)
    pipe.mask_scheduler = MaisiRFlowScheduler()
    with pytest.raises(
        ValueError, match="num_inference_steps=1001 is not allowed: give a whole number from 1 to 1000"
    ):
        call(pipe, num_inference_steps=1001)
