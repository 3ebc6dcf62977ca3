"""What both pipelines do alike: noise, the sampling loop, checks of common arguments."""

import inspect
from collections.abc import Callable
from numbers import Integral

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers.flow_solvers import integrates_flow
from ..schedulers.scheduling_maisi_rflow import MaisiRFlowScheduler

OUTPUT_TYPES = ("nifti", "np", "pt", "latent")


def prediction_type_of(scheduler: SchedulerMixin) -> str:
    """What a scheduler takes from the model: `"flow_prediction"` or `"epsilon"`."""
    return "flow_prediction" if integrates_flow(scheduler) else "epsilon"


def check_sampling(
    scheduler: SchedulerMixin,
    prediction_type: str,
    batch_size: int,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    latent_shape: tuple[int, ...],
    output_type: str,
    callback_on_step_end_tensor_inputs: list[str],
) -> None:
    """Refuse arguments of a sampling run that contradict each other; raises a `ValueError`."""
    if prediction_type_of(scheduler) != prediction_type:
        raise ValueError(
            f"{type(scheduler).__name__} cannot sample from a model with prediction_type={prediction_type!r}: for "
            "'flow_prediction' take MaisiRFlowScheduler, or FlowMatchEuler, FlowMatchHeun, UniPC or DPM-Solver by "
            "`from_config(pipe.scheduler.config)` of it; for 'epsilon' DDPMScheduler"
        )
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"num_images={batch_size} is not allowed: give a whole number of at least 1")
    steps = scheduler.config.num_train_timesteps
    if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= steps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is not allowed: give a whole number from 1 to {steps}"
        )
    generators = generator if isinstance(generator, list) else [generator]
    if any(not isinstance(one, (torch.Generator, type(None))) for one in generators):
        raise ValueError(
            f"generator={generator!r} is not allowed: give torch.Generator().manual_seed(seed), or a list"
        )
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators were given for {batch_size} image(s): give one, or one an image"
        )
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents is a {type(latents).__name__}: give a tensor of shape {latent_shape}")
    if latents is not None and tuple(latents.shape) != latent_shape:
        raise ValueError(f"latents of shape {tuple(latents.shape)} do not fit: this call needs {latent_shape}")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not known: use one of {', '.join(OUTPUT_TYPES)}")
    unknown = [name for name in callback_on_step_end_tensor_inputs if name != "latents"]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs={unknown} is not available: use ['latents']")


def prepare_latents(
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
) -> torch.Tensor:
    """The initial noise, float32: drawn, or the user's own."""
    if latents is not None:
        return latents.to(device=device, dtype=torch.float32)
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)


def denoise(
    pipeline: DiffusionPipeline,
    scheduler: SchedulerMixin,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    model_timesteps: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
    callback_on_step_end: Callable | None,
    callback_on_step_end_tensor_inputs: list[str],
    first_step: int = 0,
    constrain: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Run a scheduler from noise to data.

    Args:
        pipeline: shows the progress, gets the callbacks; its `interrupt` ends the run early.
        scheduler: with its timesteps set.
        predict: (latents, timestep) to the model's output.
        latents: the noise; float32 throughout, so that half-precision models do not lose what the steps add up.
        model_timesteps: what `predict` is called at, one for each of `scheduler.timesteps`.
        generator: for schedulers that add noise.
        callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})`; returns a dictionary
            with what it changed.
        callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.
        first_step: steps that are left out; `latents` are then what they would have led to.
        constrain: (latents, timestep of the model that they are at now, `None` after the last) to latents, after each
            step.
    """
    # MAISI's velocity points to the data, that of diffusers' flow solvers to the noise.
    sign = -1.0 if integrates_flow(scheduler) and not isinstance(scheduler, MaisiRFlowScheduler) else 1.0
    step_kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first_step)

    # DDPM and rectified flow scale nothing; solvers of diffusers that count in sigmas do.
    if first_step == 0:
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    timesteps, model_timesteps = scheduler.timesteps[first_step:], model_timesteps[first_step:]
    pipeline._num_timesteps = len(timesteps)
    with pipeline.progress_bar(total=len(timesteps)) as progress_bar:
        for i, t in enumerate(timesteps):
            if pipeline.interrupt:
                break
            model_input = scale_model_input(latents, t)
            model_output = sign * predict(model_input, model_timesteps[i]).float()
            latents = scheduler.step(model_output, t, latents, **step_kwargs, return_dict=False)[0]
            if constrain is not None:
                latents = constrain(latents, None if i + 1 == len(timesteps) else model_timesteps[i + 1])

            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = callback_on_step_end(pipeline, i, t, tensors).pop("latents", latents)
            progress_bar.update()
    return latents
