"""MAISI's rectified-flow models under the flow-matching solvers of diffusers."""

import inspect

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_maisi_rflow import MaisiRFlowScheduler

FLOW_MATCH_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


def integrates_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler integrates a flow from noise to data; otherwise it removes predicted noise, as DDPM does."""
    if isinstance(scheduler, (MaisiRFlowScheduler, *FLOW_MATCH_SCHEDULERS)):
        return True
    knows_flow = "use_flow_sigmas" in inspect.signature(type(scheduler).__init__).parameters
    return knows_flow and scheduler.config.use_flow_sigmas and scheduler.config.prediction_type == "flow_prediction"


def set_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device, input_img_size_numel: int
) -> torch.Tensor:
    """
    Set the timesteps of any scheduler for a latent of the given size.

    A flow solver gets the size-dependent timesteps of [`MaisiRFlowScheduler`] where its config, carried over by
    `from_config`, asks for them: they are what diffusers calls a shift, by the ratio of the edge lengths.

    Args:
        scheduler: of MAISI or of diffusers.
        num_inference_steps: number of steps.
        device: where the timesteps go.
        input_img_size_numel: voxels of the latent, X * Y * Z.

    Returns:
        the timesteps to call the model at, one for each of `scheduler.timesteps`. Multistep solvers round theirs to
        whole numbers, the model is to have the exact ones.
    """
    if isinstance(scheduler, MaisiRFlowScheduler):
        scheduler.set_timesteps(num_inference_steps, device=device, input_img_size_numel=input_img_size_numel)
        return scheduler.timesteps
    if not integrates_flow(scheduler):
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.timesteps

    if scheduler.config.get("use_timestep_transform"):
        shift = (input_img_size_numel / scheduler.config["base_img_size_numel"]) ** (1 / 3)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            scheduler.set_shift(shift)
        elif isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            scheduler.register_to_config(shift=shift)
        else:
            scheduler.register_to_config(flow_shift=shift)

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # The even steps of MAISI; by itself the solver would end with a sliver of a step.
        sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        scheduler.set_timesteps(sigmas=sigmas, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)]
    return (sigmas * scheduler.config.num_train_timesteps).to(device)
