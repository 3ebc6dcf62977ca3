"""Schedulers step for step, and whole samples from the same noise."""

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from monai.networks.schedulers import DDPMScheduler as MonaiDDPMScheduler
from monai.networks.schedulers import RFlowScheduler

from maisi_diffusers import MaisiMaskPipeline, MaisiRFlowScheduler
from maisi_diffusers.anatomy import MASK_VAE_LABELS

from .monai_reference import MASK_SCALE_FACTOR, SCALE_FACTOR, label_bits, make_scheduler, sample
from .test_networks import assert_close

STEPS = 5
SPACING = (0.75, 0.75, 2.0)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 30, 77, 333])
@pytest.mark.parametrize("shape", [(8, 8, 8), (32, 32, 32), (64, 64, 32), (128, 128, 128), (128, 128, 192)], ids=str)
def test_rflow_steps(steps, shape):
    """The timesteps are equal and every step is, with MONAI's rounding on."""
    generator = torch.Generator().manual_seed(steps)
    reference = make_scheduler("rflow-ct")
    reference.set_timesteps(num_inference_steps=steps, input_img_size_numel=torch.prod(torch.tensor(shape)))
    scheduler = MaisiRFlowScheduler(monai_rounding=True)
    scheduler.set_timesteps(steps, input_img_size_numel=int(np.prod(shape)))
    assert torch.equal(scheduler.timesteps, reference.timesteps.float())

    own = monai = torch.randn(1, 4, 2, 2, 2, generator=generator)
    nexts = [*reference.timesteps[1:], 0]
    for t, monai_t, next_t in zip(scheduler.timesteps, reference.timesteps, nexts):
        velocity = torch.randn(own.shape, generator=generator)
        monai, monai_data = reference.step(velocity, monai_t, monai, next_t)
        output = scheduler.step(velocity, t, own)
        own = output.prev_sample
        assert_close(own, monai, 1e-6)
        assert_close(output.pred_original_sample, monai_data, 1e-6)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_rflow_discrete_steps(steps):
    reference = RFlowScheduler(use_discrete_timesteps=True, use_timestep_transform=False, steps_offset=1)
    reference.set_timesteps(num_inference_steps=steps)
    scheduler = MaisiRFlowScheduler(
        use_discrete_timesteps=True, use_timestep_transform=False, steps_offset=1, monai_rounding=True
    )
    scheduler.set_timesteps(steps)
    assert torch.equal(scheduler.timesteps, reference.timesteps.float())


@pytest.mark.parametrize("method", ["uniform", "logit-normal"])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("discrete", [False, True])
def test_rflow_training_side(method, transform, discrete):
    data = torch.randn(16, 4, 8, 12, 16)
    noise = torch.randn_like(data)
    options = {"sample_method": method, "use_timestep_transform": transform, "use_discrete_timesteps": discrete}
    options |= {"loc": 0.3, "scale": 1.4}
    reference, scheduler = RFlowScheduler(**options), MaisiRFlowScheduler(**options)
    torch.manual_seed(4)
    expected = reference.sample_timesteps(data)
    torch.manual_seed(4)
    timesteps = scheduler.sample_timesteps(data)
    assert_close(timesteps, expected.float(), 1e-6)
    assert_close(scheduler.add_noise(data, noise, timesteps), reference.add_noise(data, noise, timesteps), 1e-6)
    # The published training's target.
    assert torch.equal(scheduler.get_velocity(data, noise, timesteps), data - noise)


def test_ddpm_steps():
    """All 1000 of 1000, as the models were released."""
    reference = make_scheduler("ddpm-ct")
    reference.set_timesteps(1000)
    scheduler = DDPMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    assert torch.equal(scheduler.timesteps, reference.timesteps)
    own = monai = torch.randn(1, 4, 2, 2, 2)
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        noise = torch.randn(own.shape)
        monai, _ = reference.step(noise, t, monai, generator=generators[0])
        own = scheduler.step(noise, t, own, generator=generators[1]).prev_sample
        assert_close(own, monai, 1e-4)


def ddpm_of_five(scheduler):
    return DDPMScheduler.from_config(scheduler.config, num_train_timesteps=STEPS)


@pytest.fixture
def schedulers(pair):
    """A MONAI scheduler, with the pipeline's set to the same; DDPM agrees where it runs all of its steps."""
    released = pair.pipe.scheduler
    if pair.version == "ddpm-ct":
        pair.pipe.scheduler = ddpm_of_five(released)
        yield make_scheduler(pair.version, num_train_timesteps=STEPS)
    else:
        yield make_scheduler(pair.version)
    pair.pipe.scheduler = released


class Reference:
    """The published sampling on MONAI's networks."""

    def __init__(self, pair, scheduler, seed):
        self.pair, self.scheduler, self.seed = pair, scheduler, seed
        self.noise = torch.randn(1, 4, *pair.size.latent, generator=torch.Generator().manual_seed(seed))
        self.output_size = tuple(4 * size for size in pair.size.latent)

    def predict(self, latents, t, modality, regions, condition):
        unet, controlnet = self.pair.monai["unet"], self.pair.monai["controlnet"]
        inputs = {"x": latents.clone(), "timesteps": t, "spacing_tensor": torch.tensor([SPACING]) * 100}
        classes = {"class_labels": torch.tensor([modality])} if self.pair.version == "rflow-ct" else {}
        if self.pair.version == "ddpm-ct":
            top, bottom = (torch.eye(4)[[index]] * 100 for index in regions)
            inputs |= {"top_region_index_tensor": top, "bottom_region_index_tensor": bottom}
        if condition is not None:
            down, mid = controlnet(x=latents, timesteps=t, controlnet_cond=condition, **classes)
            inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(**inputs, **classes)

    def run(self, modality, regions, condition=None, guidance=0.0, uncondition=None):
        def predict(latents, t):
            output = self.predict(latents, t, modality, regions, condition)
            if guidance == 0:
                return output
            uncond = self.predict(latents, t, 0, regions, uncondition)
            return uncond + guidance * (output - uncond)

        generator = torch.Generator().manual_seed(self.seed)
        return sample(self.scheduler, predict, self.noise, STEPS, generator)

    def to_image(self, latents, modality):
        image = self.pair.monai["vae"].decode_stage_2_outputs(latents / SCALE_FACTOR)
        return image.clip(0, 1) * 2000 - 1000 if modality <= 7 else image.clip(0) * 1000

    def call(self, output_type, **kwargs):
        return self.pair.pipe(
            latents=self.noise,
            generator=torch.Generator().manual_seed(self.seed),
            num_inference_steps=STEPS,
            output_type=output_type,
            **kwargs,
        )


@pytest.mark.parametrize(("modality", "guidance"), [("ct", 0.0), ("t1", 15.0)])
def test_image_only(pair, schedulers, modality, guidance):
    if pair.version == "ddpm-ct":
        modality = "ct_contrast"  # it makes no other kind, and takes no code
    reference = Reference(pair, schedulers, seed=11)
    code = {"ct": 1, "ct_contrast": 3, "t1": 9}[modality]
    latents = reference.run(code, regions=(1, 2), guidance=guidance)
    arguments = {
        "image_only": True,
        "body_region": ["abdomen", "chest"],
        "modality": modality,
        "guidance_scale": guidance,
        "output_size": reference.output_size,
        "spacing": SPACING,
    }
    assert_close(reference.call("latent", **arguments).images, latents, 1e-4)
    output = reference.call("pt", **arguments)
    assert_close(output.images, reference.to_image(latents, code), 1e-4)
    assert output.labels is None


@pytest.fixture
def label_map(pair):
    """Blocks of labels of thorax to pelvis, with a hepatic tumor, the body around and air outside."""
    size = [4 * n for n in pair.size.latent]
    labels = np.zeros(size, dtype=np.uint8)
    labels[2:-2, 2:-2] = 200
    labels[4:8, 4:8, :6] = 93
    labels[3:9, 3:12, 6:12] = 1
    labels[5:7, 5:9, 8:10] = 26
    labels[9:13, 4:10, 9:15] = 28
    labels[10:12, 8:12, 2:5] = 115
    return labels


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_mask(pair, schedulers, label_map, guidance):
    reference = Reference(pair, schedulers, seed=12)
    without_tumor = np.where(label_map == 26, 1, label_map)
    bits, bits_without = (label_bits(torch.from_numpy(m)[None, None]) for m in (label_map, without_tumor))
    latents = reference.run(1, regions=(1, 3), condition=bits, guidance=guidance, uncondition=bits_without)
    image = reference.to_image(latents, 1)
    image[0, 0][torch.from_numpy(label_map == 0)] = -1000

    arguments = {
        "mask": nib.Nifti1Image(label_map, np.diag([*SPACING, 1.0])),
        "output_size": reference.output_size,
        "spacing": SPACING,
        "guidance_scale": guidance,
    }
    assert_close(reference.call("latent", **arguments).images, latents, 1e-4)
    output = reference.call("pt", **arguments)
    assert_close(output.images, image, 1e-4)
    assert np.array_equal(output.labels[0, 0], label_map)


def test_generated_mask(pair):
    """Before any clean-up: the latents agree, and the labels but for near ties."""
    sizes = [0.1, 0.5, -1.0, 0.3, 0.7, -1.0, -1.0, 0.3, -1.0, -1.0]
    noise = torch.randn(1, 4, *pair.size.latent, generator=torch.Generator().manual_seed(13))
    scheduler = MonaiDDPMScheduler(
        num_train_timesteps=STEPS, beta_start=0.0015, beta_end=0.0195, schedule="scaled_linear_beta", clip_sample=False
    )
    context = torch.tensor(sizes).view(1, 1, 10)
    latents = sample(
        scheduler,
        lambda latents, t: pair.monai["mask_unet"](x=latents, timesteps=t, context=context),
        noise,
        STEPS,
        torch.Generator().manual_seed(13),
    )
    logits = pair.monai["mask_vae"].decode(latents / MASK_SCALE_FACTOR)
    labels = torch.tensor(MASK_VAE_LABELS)[logits.softmax(dim=1).argmax(dim=1, keepdim=True)]

    pipe = MaisiMaskPipeline(
        pair.pipe.mask_vae,
        pair.pipe.mask_unet,
        ddpm_of_five(pair.pipe.mask_scheduler),
        mask_latent_size=pair.size.latent,
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {"anatomy_size": sizes, "latents": noise, "num_inference_steps": STEPS, "clean_up": False}
    own = pipe(**arguments, generator=torch.Generator().manual_seed(13), output_type="latent").masks
    assert_close(own, latents, 1e-4)
    own = pipe(**arguments, generator=torch.Generator().manual_seed(13), output_type="pt").masks
    assert own.shape == labels.shape and own.dtype == torch.uint8
    assert (own != labels).float().mean() < 1e-3
    assert own.unique().numel() > 20
