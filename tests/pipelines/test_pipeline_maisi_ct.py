import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from maisi_diffusers import MaisiCTPipeline, MaisiCTPipelineOutput, MaisiMaskPipeline
from maisi_diffusers.imaging import resample_to_grid
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded

IMAGE_ONLY = {"image_only": True, "output_size": SIZE, "spacing": SPACING, "body_region": ["chest"]}


@pytest.fixture(scope="module", params=["rflow-ct", "ddpm-ct"])
def pipe(request):
    return make_pipeline(request.param)


@pytest.fixture(scope="module")
def rflow():
    return make_pipeline("rflow-ct")


def test_nifti_output(pipe):
    mask = make_label_map()
    output = pipe(mask=mask, generator=seeded())
    assert isinstance(output, MaisiCTPipelineOutput)
    image, labels = output.images[0], output.labels[0]
    assert image.get_data_dtype() == np.int16 and labels.get_data_dtype() == np.uint8
    assert image.shape == labels.shape == SIZE
    np.testing.assert_allclose(image.affine, mask.affine)
    np.testing.assert_allclose(labels.affine, mask.affine)
    for nifti in (image, labels):
        header = nifti.header
        assert header["sform_code"] > 0 and header["qform_code"] > 0
        assert header.get_xyzt_units()[0] == "mm"
        assert "synthetic" in header["descrip"].item().decode()
        np.testing.assert_allclose(nifti.get_qform(), mask.affine, atol=1e-5)
    hu = image.get_fdata()
    assert hu.min() >= -1000 and hu.max() <= 1000
    outside = np.asarray(labels.dataobj) == 0
    assert outside.any() and (hu[outside] == -1000).all()
    assert hu[~outside].std() > 10
    assert np.array_equal(labels.dataobj, mask.dataobj)


def test_output_types_agree(pipe):
    arguments = {"mask": make_label_map(), "num_images": 2}
    images = {
        kind: pipe(**arguments, generator=seeded(), output_type=kind) for kind in ("nifti", "np", "pt", "latent")
    }
    assert images["np"].images.shape == images["np"].labels.shape == (2, *SIZE)
    assert images["pt"].images.shape == images["pt"].labels.shape == (2, 1, *SIZE)
    assert images["latent"].images.shape == (2, 4, *(n // 4 for n in SIZE))
    assert images["np"].images.dtype == np.float32 and images["pt"].images.dtype == torch.float32
    assert images["np"].labels.dtype == np.uint8 and images["pt"].labels.dtype == torch.uint8
    assert np.array_equal(images["np"].images, images["pt"].images[:, 0].numpy())
    for i in range(2):
        assert np.array_equal(np.asarray(images["nifti"].images[i].dataobj), np.rint(images["np"].images[i]))
        assert np.array_equal(np.asarray(images["nifti"].labels[i].dataobj), images["np"].labels[i])
    assert not np.array_equal(images["np"].images[0], images["np"].images[1])

    as_tuple = pipe(**arguments, generator=seeded(), output_type="np", return_dict=False)
    assert np.array_equal(as_tuple[0], images["np"].images) and np.array_equal(as_tuple[1], images["np"].labels)


@pytest.mark.parametrize("name", ["unet", "controlnet", "vae"])
def test_a_compiled_network(name):
    pipe, arguments = make_pipeline(), {"mask": make_label_map(), "output_type": "latent"}
    expected = pipe(**arguments, generator=seeded()).images
    setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    torch.testing.assert_close(pipe(**arguments, generator=seeded()).images, expected)
    assert pipe(mask=make_label_map(), generator=seeded()).images[0].shape == SIZE


def test_the_same_label_map_is_embedded_once(monkeypatch):
    """Where guidance has no tumor to leave out."""
    embedded, embed = [], MaisiCTPipeline.embed_label_maps
    monkeypatch.setattr(
        MaisiCTPipeline,
        "embed_label_maps",
        lambda pipe, maps, *args: embedded.append(maps) or embed(pipe, maps, *args),
    )
    rflow = make_pipeline()
    plain = np.asarray(make_label_map().dataobj)
    plain = np.where(np.isin(plain, list(rflow.tumors)), 1, plain)
    for labels, times in ((plain, 1), (np.where(np.arange(SIZE[2]) == 12, 26, plain), 2)):
        embedded.clear()
        mask = nib.Nifti1Image(labels.astype(np.uint8), make_label_map().affine)
        rflow(mask=mask, guidance_scale=2.0, generator=seeded(), output_type="latent")
        assert len(embedded) == times


def test_image_only(pipe):
    output = pipe(**IMAGE_ONLY, generator=seeded())
    assert output.labels is None
    np.testing.assert_allclose(output.images[0].affine, np.diag([*SPACING, 1]))
    assert output.images[0].shape == SIZE


def test_generated_mask(pipe):
    sizes = [("liver", 0.5), ("hepatic tumor", 0.3)]
    output = pipe(
        controllable_anatomy_size=sizes, output_size=SIZE, spacing=SPACING, body_region=["abdomen"], generator=seeded()
    )
    masks = MaisiMaskPipeline.from_pipe(pipe)
    masks.set_progress_bar_config(disable=True)
    mask = masks(controllable_anatomy_size=sizes, generator=seeded()).masks[0]
    assert mask.shape == (16, 16, 16) and mask.get_data_dtype() == np.uint8
    np.testing.assert_allclose(mask.affine, np.diag([6, 6, 6, 1]))
    # The label map of the CT is that mask on the wanted grid.
    labels = np.asarray(output.labels[0].dataobj)
    assert labels.any() and np.array_equal(labels, resample_to_grid(mask, SIZE, SPACING, order=0, fill=0).dataobj)

    several = pipe(
        anatomy_size=[0.1] * 5 + [-1] * 5,
        output_size=SIZE,
        spacing=SPACING,
        body_region=["chest"],
        num_images=2,
        generator=[seeded(1), seeded(2)],
        output_type="np",
    )
    assert not np.array_equal(several.labels[0], several.labels[1])


def test_anatomy_that_is_not_where_it_was_asked_for(pipe, monkeypatch):
    """Neither what was not made nor what lies beyond the grid of the CT goes without a word."""
    labels = np.zeros((1, 1, 16, 16, 16), dtype=np.uint8)
    labels[0, 0, 1:-1, 1:-1, 1:-1] = 200
    labels[0, 0, 1:4, 1:4, 1:4] = 1
    monkeypatch.setattr(MaisiMaskPipeline, "decode", lambda self, latents: torch.from_numpy(labels))
    request = {"body_region": ["abdomen"], "output_type": "np", "generator": seeded()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(
            controllable_anatomy_size=[("liver", 0.5), ("hepatic tumor", 0.3)],
            output_size=(16, 16, 16),
            spacing=(3.0, 3.0, 3.0),
            **request,
        )
    messages = [str(one.message) for one in caught if "label map 0" in str(one.message)]
    assert len(messages) == 2
    assert "has no hepatic tumor, which was asked for: another seed" in messages[0]
    assert "was made with liver, which is not on the grid (16, 16, 16) of (3.0, 3.0, 3.0) mm: use a" in messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(
            controllable_anatomy_size=[("liver", 0.5)],
            output_size=(16, 16, 16),
            spacing=(6.0, 6.0, 6.0),
            quality_check=False,
            **request,
        )


@pytest.mark.parametrize("arguments", [{"mask": make_label_map()}, IMAGE_ONLY], ids=["mask", "image only"])
def test_seeds(pipe, arguments):
    def call(generator, **kwargs):
        return pipe(**arguments, generator=generator, output_type="np", **kwargs).images

    assert np.array_equal(call(seeded(3)), call(seeded(3)))
    assert not np.array_equal(call(seeded(3)), call(seeded(4)))
    # One generator an image: each as if made alone.
    both = call([seeded(3), seeded(4)], num_images=2)
    np.testing.assert_allclose(both[0], call(seeded(3))[0], atol=2)
    np.testing.assert_allclose(both[1], call(seeded(4))[0], atol=2)


def test_latents_are_the_noise(rflow):
    shape = (1, 4, *(n // 4 for n in SIZE))
    noise = torch.randn(shape, generator=seeded(5))
    drawn = rflow(**IMAGE_ONLY, generator=seeded(5), output_type="latent").images
    assert torch.equal(rflow(**IMAGE_ONLY, latents=noise, output_type="latent").images, drawn)


def test_conditions_reach_the_output(rflow):
    """Spacing, modality, mask, scale and guidance each change the image."""
    mask = make_label_map()

    def call(**kwargs):
        return rflow(**({"mask": mask} | kwargs), generator=seeded(), output_type="latent").images

    base = call()
    other_labels = np.asarray(mask.dataobj).copy()
    other_labels[other_labels == 28] = 32
    variants = {
        "spacing": call(mask=nib.Nifti1Image(mask.dataobj, np.diag([1.5, 1.5, 3, 1]))),
        "modality": call(modality="ct_contrast"),
        "mask": call(mask=nib.Nifti1Image(other_labels, mask.affine)),
        "scale": call(controlnet_conditioning_scale=0.5),
        "guidance": call(guidance_scale=2.0),
        "steps": call(num_inference_steps=3),
    }
    for name, latents in variants.items():
        assert (latents - base).abs().max() > 1e-4 * base.abs().max(), name
    no_controlnet = call(controlnet_conditioning_scale=0.0)
    image_only = rflow(**IMAGE_ONLY, generator=seeded(), output_type="latent").images
    torch.testing.assert_close(no_controlnet, image_only)


def test_regions_reach_the_output():
    pipe = make_pipeline("ddpm-ct")

    def call(words):
        return pipe(**(IMAGE_ONLY | {"body_region": words}), generator=seeded(), output_type="latent").images

    base = call(["chest", "abdomen"])
    assert torch.equal(call(["abdomen", "chest"]), base)  # from the top, whatever the order
    assert not torch.equal(call(["chest", "pelvis"]), base)
    assert not torch.equal(call(["head", "abdomen"]), base)
    # A label map tells its regions: thorax to pelvis here.
    by_mask = pipe(mask=make_label_map(), generator=seeded(), output_type="latent").images
    by_words = pipe(
        mask=make_label_map(), body_region=["chest", "lower"], generator=seeded(), output_type="latent"
    ).images
    assert torch.equal(by_mask, by_words)


def test_condition_is_embedded_once(rflow, monkeypatch):
    calls = []
    embed = rflow.controlnet.embed_condition
    monkeypatch.setattr(rflow.controlnet, "embed_condition", lambda bits: calls.append(bits.shape) or embed(bits))
    rflow(mask=make_label_map(), num_images=2, num_inference_steps=4, generator=seeded())
    assert calls == [(1, 8, *SIZE)]


def test_callback_and_interrupt(rflow):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        if step == 1:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = rflow(
        **IMAGE_ONLY, num_inference_steps=5, callback_on_step_end=callback, generator=seeded(), output_type="latent"
    )
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1] > seen[1][1]
    assert not output.images.any()  # what the callback returned last
    rflow(**IMAGE_ONLY, num_inference_steps=1, generator=seeded())
    assert not rflow.interrupt and rflow.num_timesteps == 1


def test_progress_bar(rflow, capsys):
    rflow.set_progress_bar_config(disable=False)
    rflow(**IMAGE_ONLY, num_inference_steps=3, generator=seeded())
    rflow.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err


def test_mr(rflow):
    output = rflow(**IMAGE_ONLY, modality="t1", guidance_scale=2.0, generator=seeded(), output_type="np")
    assert output.images.min() >= 0
    labels = rflow(mask=make_label_map(), modality="t2", generator=seeded(), output_type="np")
    assert (labels.images[labels.labels == 0] == 0).all()


def test_guidance_that_the_model_was_released_with(rflow):
    def call(**kwargs):
        return rflow(**IMAGE_ONLY, modality="t1", generator=seeded(), output_type="latent", **kwargs).images

    off, guided = call(), call(guidance_scale=15.0)
    rflow.register_to_config(guidance_scale=15.0)
    try:
        assert torch.equal(call(), guided) and torch.equal(call(guidance_scale=0.0), off)
    finally:
        rflow.register_to_config(guidance_scale=0.0)
    assert not torch.equal(off, guided)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe = make_pipeline("rflow-ct")
    full = pipe(mask=make_label_map(), generator=seeded(), output_type="latent").images
    half = pipe.to(dtype)(mask=make_label_map(), generator=seeded(), output_type="latent").images
    assert half.dtype == torch.float32  # the sampling stays in float32
    layout = {"memory_format": torch.channels_last_3d}
    assert all(one.conv_in.weight.is_contiguous(**layout) for one in (pipe.unet, pipe.controlnet, pipe.vae.decoder))
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (half - full).abs().max() <= tolerance * full.abs().max()
    assert pipe(mask=make_label_map(), generator=seeded(), output_type="np").images.dtype == np.float32


def test_from_pipe(pipe):
    image_only = MaisiCTPipeline.from_pipe(pipe, controlnet=None)
    assert image_only.controlnet is None and image_only.unet is pipe.unet
    assert image_only.config.num_inference_steps == pipe.config.num_inference_steps
    image_only.set_progress_bar_config(disable=True)
    expected = pipe(**IMAGE_ONLY, generator=seeded(), output_type="np").images
    assert np.array_equal(image_only(**IMAGE_ONLY, generator=seeded(), output_type="np").images, expected)


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "float32")])
def test_from_pipe_leaves_dtypes(dtypes):
    pipe = make_pipeline(with_mask_networks=False).to(getattr(torch, dtypes[0]))
    pipe.controlnet.to(getattr(torch, dtypes[1]))
    before = {name: weight.clone() for name, weight in pipe.unet.named_parameters()}
    other = MaisiCTPipeline.from_pipe(pipe)
    assert other.controlnet.dtype == getattr(torch, dtypes[1])
    for name, weight in other.unet.named_parameters():
        assert weight.dtype == before[name].dtype and torch.equal(weight, before[name]), name
    assert MaisiCTPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32


def test_guidance_by_nothing():
    """A model that is not told the modality, and no tumor: a second prediction would be the first again."""
    pipe, calls = make_pipeline("ddpm-ct", with_mask_networks=False), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="guidance_scale=2.0 does nothing here"):
        pipe(**IMAGE_ONLY, guidance_scale=2.0, generator=seeded())
    assert len(calls) == 2
    pipe(mask=make_label_map(), guidance_scale=2.0, generator=seeded())  # with a tumor
    assert len(calls) == 2 + 4


def test_voxels_that_are_no_numbers(pipe):
    latents = torch.full((1, 4, *(n // 4 for n in SIZE)), torch.nan)
    with pytest.raises(ValueError, match="no finite numbers, computed in torch.float32: load the model in bfloat16"):
        pipe(**IMAGE_ONLY, latents=latents)


HAS_ACCELERATOR = torch.accelerator.is_available()


@pytest.mark.parametrize(
    ("method", "device"),
    [
        ("enable_model_cpu_offload", "cpu"),
        pytest.param(
            "enable_sequential_cpu_offload",
            None,
            marks=pytest.mark.skipif(
                not HAS_ACCELERATOR, reason="accelerate moves single layers to accelerators only"
            ),
        ),
    ],
)
def test_offload(method, device):
    """Every part is where it has to be when it is called, also in a second call."""
    pipe = make_pipeline("rflow-ct")
    arguments = {
        "controllable_anatomy_size": [("liver", 0.5)],
        "output_size": SIZE,
        "spacing": SPACING,
        "output_type": "np",
    }
    expected = pipe(**arguments, generator=seeded()).images
    getattr(pipe, method)(device=device)
    for _ in range(2):
        assert np.array_equal(pipe(**arguments, generator=seeded()).images, expected)


def test_model_offload_order():
    components = make_pipeline("rflow-ct").components
    order = MaisiCTPipeline.model_cpu_offload_seq.split("->")
    networks = {name for name, component in components.items() if isinstance(component, torch.nn.Module)}
    # The ControlNet is called in turn with the UNet: in the chain, each would send the other away at every step.
    assert networks - set(order) == {"controlnet"}
    assert order.index("mask_unet") < order.index("mask_vae") < order.index("unet") < order.index("vae")


def test_solver_in_sigmas():
    """A solver whose noise and model input are scaled goes where DDIM goes, in the epsilon model."""
    pipe = make_pipeline("ddpm-ct")
    config, found = pipe.scheduler.config, {}
    for solver in (DDIMScheduler, EulerDiscreteScheduler):
        pipe.scheduler = solver.from_config(config, timestep_spacing="trailing")
        found[solver] = pipe(**IMAGE_ONLY, num_inference_steps=50, generator=seeded(), output_type="latent").images
    error = (found[EulerDiscreteScheduler] - found[DDIMScheduler]).norm() / found[DDIMScheduler].norm()
    assert error < 0.01


def test_steps_of_images_without_a_label_map():
    """A model may want more of them; a number that is given is what is taken."""
    pipe = make_pipeline("rflow-ct")
    pipe.register_to_config(num_inference_steps=2, image_only_num_inference_steps=3)
    for request, steps in (
        (IMAGE_ONLY, 3),
        (IMAGE_ONLY | {"num_inference_steps": 1}, 1),
        ({"mask": make_label_map()}, 2),
    ):
        pipe(**request, generator=seeded(), output_type="latent")
        assert pipe.num_timesteps == steps
