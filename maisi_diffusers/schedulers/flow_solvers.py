"""MAISI's rectified-flow models under the flow-matching solvers of diffusers."""

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_maisi_rflow import MaisiRFlowScheduler

FLOW_MATCH_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
# Others of diffusers know flow sigmas too, but fail at the last one, 0.
MULTISTEP_SCHEDULERS = (UniPCMultistepScheduler, DPMSolverMultistepScheduler)
# The multistep solvers take the logarithm of 1 - sigma.
ALMOST_ONE = 1 - 1e-6


def integrates_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler integrates a flow from noise to data; otherwise it removes predicted noise, as DDPM does."""
    if isinstance(scheduler, (MaisiRFlowScheduler, *FLOW_MATCH_SCHEDULERS)):
        return True
    is_multistep = isinstance(scheduler, MULTISTEP_SCHEDULERS)
    return is_multistep and scheduler.config.use_flow_sigmas and scheduler.config.prediction_type == "flow_prediction"


def set_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device, input_img_size_numel: int
) -> torch.Tensor:
    """
    Set the timesteps of any scheduler for a latent of the given size.

    A flow solver whose config was carried over from [`MaisiRFlowScheduler`] gets the timesteps of that: even ones,
    shifted by the size of the latent. One without `use_timestep_transform` in its config keeps a schedule of its own.

    Args:
        scheduler: of MAISI or of diffusers.
        num_inference_steps: number of steps.
        device: where the timesteps go.
        input_img_size_numel: voxels of the latent, X * Y * Z.

    Returns:
        the timesteps to call the model at, one for each of `scheduler.timesteps`: multistep solvers round theirs to
        whole numbers, the model is to have the exact ones.
    """
    if isinstance(scheduler, MaisiRFlowScheduler):
        scheduler.set_timesteps(num_inference_steps, device=device, input_img_size_numel=input_img_size_numel)
        return scheduler.timesteps
    scheduler.set_timesteps(num_inference_steps, device=device)
    if not integrates_flow(scheduler):
        return scheduler.timesteps

    num_train_timesteps = scheduler.config.num_train_timesteps
    if scheduler.config.get("use_timestep_transform"):
        reference = MaisiRFlowScheduler(num_train_timesteps, base_img_size_numel=scheduler.config.base_img_size_numel)
        reference.set_timesteps(num_inference_steps, input_img_size_numel=input_img_size_numel)
        timesteps = reference.timesteps
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        elif not isinstance(scheduler, FLOW_MATCH_SCHEDULERS):
            timesteps = timesteps.clamp(max=ALMOST_ONE * num_train_timesteps)
        scheduler.timesteps = timesteps.to(scheduler.timesteps)
        scheduler.sigmas = torch.cat([timesteps / num_train_timesteps, torch.zeros(1)]).to(scheduler.sigmas)
    return (scheduler.sigmas[: len(scheduler.timesteps)] * num_train_timesteps).to(device)
