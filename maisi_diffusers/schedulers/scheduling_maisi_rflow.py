"""Rectified flow as MAISI uses it."""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class MaisiRFlowSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor`): the sample at the next timestep, one step nearer to the data.
        pred_original_sample (`torch.Tensor`): the data that the velocity points to.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class MaisiRFlowScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Rectified flow ([Liu et al., 2022](https://arxiv.org/abs/2209.03003)) with the size-dependent timesteps of MAISI-v2
    ([Zhao et al., 2025](https://arxiv.org/abs/2508.05772)).

    A sample at timestep t is (1 - t/1000) * data + t/1000 * noise, and the model predicts the velocity data - noise.
    The flow-matching solvers of diffusers take noise - data over the same timesteps: negate the model's output for
    them. Their `from_config(scheduler.config)` carries over what they need (`prediction_type`, `use_flow_sigmas`).

    Args:
        num_train_timesteps: the timestep of pure noise.
        use_discrete_timesteps: round timesteps to whole numbers.
        sample_method: how training timesteps are drawn: `"uniform"` or `"logit-normal"`.
        loc: mean of the logit-normal.
        scale: standard deviation of the logit-normal.
        use_timestep_transform: shift timesteps towards noise for latents larger than `base_img_size_numel`, and
            towards data for smaller ones.
        base_img_size_numel: latent voxels whose timesteps stay as they are.
        steps_offset: added to the timesteps of inference.
        monai_rounding: reproduce MONAI's sampler step for step. It rounds the timesteps to float16 and, in the step
            size, truncates the next timestep to a whole number, so that its step sizes do not add up to 1. Off, the
            flow is integrated exactly.
        prediction_type: `"flow_prediction"`, the only one; here for the `from_config` of other solvers.
        use_flow_sigmas: `True`, the only one; here for the `from_config` of other solvers.
    """

    _compatibles = [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        use_discrete_timesteps: bool = False,
        sample_method: str = "uniform",
        loc: float = 0.0,
        scale: float = 1.0,
        use_timestep_transform: bool = True,
        base_img_size_numel: int = 32 * 32 * 32,
        steps_offset: int = 0,
        monai_rounding: bool = False,
        prediction_type: str = "flow_prediction",
        use_flow_sigmas: bool = True,
    ):
        if sample_method not in ("uniform", "logit-normal"):
            raise ValueError(f"sample_method={sample_method!r} is not known: use 'uniform' or 'logit-normal'")
        if prediction_type != "flow_prediction" or not use_flow_sigmas:
            raise ValueError(
                f"rectified flow predicts a velocity: prediction_type={prediction_type!r} and use_flow_sigmas="
                f"{use_flow_sigmas} belong to another kind of model; use the scheduler the model was trained with"
            )
        # `from_config` of another solver skips what was left at its default; these have to reach it all the same.
        self.register_to_config(_use_default_values=[], _class_name=type(self).__name__)
        self.num_inference_steps = None
        self.timesteps = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32)
        self._step_index = None
        self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Index of the current timestep; `None` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first timestep, where the pipeline set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of the timesteps, so that no timestep has to be looked up."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: rectified flow scales nothing."""
        return sample

    def transform_timesteps(self, timesteps: torch.Tensor, input_img_size_numel: int) -> torch.Tensor:
        """
        Shift timesteps by the size of the latent: t -> r t / (1 + (r - 1) t) with r the ratio of the edge lengths.

        Args:
            timesteps: from 0 to `num_train_timesteps`.
            input_img_size_numel: voxels of the latent, X * Y * Z.

        Returns:
            the shifted timesteps, computed in float32 as published.
        """
        edge = torch.tensor(input_img_size_numel, device=timesteps.device) / self.config.base_img_size_numel
        ratio = edge ** (1.0 / 3)
        t = (timesteps / self.config.num_train_timesteps).float()
        return ratio * t / (1 + (ratio - 1) * t) * self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        input_img_size_numel: int | None = None,
    ) -> None:
        """
        Set the timesteps of a sampling run.

        Args:
            num_inference_steps: number of steps, from 1 to `num_train_timesteps`.
            device: where the timesteps go.
            input_img_size_numel: voxels of the latent, X * Y * Z; required with `use_timestep_transform`.
        """
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} is not allowed: "
                f"give 1 to {self.config.num_train_timesteps}"
            )
        steps = torch.arange(num_inference_steps, dtype=torch.float64)
        timesteps = (1.0 - steps / num_inference_steps) * self.config.num_train_timesteps
        if self.config.use_discrete_timesteps:
            timesteps = timesteps.round()
        if self.config.use_timestep_transform:
            if input_img_size_numel is None:
                raise ValueError(
                    "give `input_img_size_numel`, the voxels of the latent, to a scheduler that shifts by it"
                )
            timesteps = self.transform_timesteps(timesteps, input_img_size_numel)
        if self.config.monai_rounding:
            timesteps = timesteps.half()
        timesteps = timesteps.float()
        if self.config.use_discrete_timesteps:
            timesteps = timesteps.trunc()

        self.num_inference_steps = num_inference_steps
        self.timesteps = (timesteps + self.config.steps_offset).to(device)
        self._step_index = None
        self._begin_index = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> MaisiRFlowSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One Euler step along the velocity.

        Args:
            model_output (N, C, X, Y, Z): the predicted velocity, data minus noise.
            timestep: one of `timesteps`.
            sample (N, C, X, Y, Z): the sample at that timestep.
            return_dict: return a [`MaisiRFlowSchedulerOutput`] instead of a tuple.
        """
        if self.num_inference_steps is None:
            raise ValueError("call `set_timesteps` before `step`")
        if self._step_index is None:
            self._step_index = self._begin_index if self._begin_index is not None else self._index_of(timestep)

        current = self.timesteps[self._step_index].item()
        is_last = self._step_index + 1 == len(self.timesteps)
        following = 0.0 if is_last else self.timesteps[self._step_index + 1].item()
        if self.config.monai_rounding:
            following = int(following)
        dt = (current - following) / self.config.num_train_timesteps

        # float32, so that half-precision models do not lose what they add up
        velocity = model_output.float()
        sample = sample.float()
        prev_sample = sample + velocity * dt
        pred_original_sample = sample + velocity * current / self.config.num_train_timesteps
        self._step_index += 1

        prev_sample = prev_sample.to(model_output.dtype)
        pred_original_sample = pred_original_sample.to(model_output.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return MaisiRFlowSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        indices = (self.timesteps == timestep).nonzero()
        if len(indices) == 0:
            raise ValueError(f"timestep {float(timestep)} is not one of `timesteps`: pass them in turn")
        return indices[0].item()

    def sample_timesteps(self, sample: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Draw training timesteps.

        Args:
            sample (N, C, X, Y, Z): clean latents; their size shifts the timesteps.
            generator: makes the draw deterministic.

        Returns:
            (N,) float32, from 0 to `num_train_timesteps`.
        """
        shape, device = (sample.shape[0],), sample.device
        if self.config.sample_method == "uniform":
            timesteps = torch.rand(shape, generator=generator, device=device)
        else:
            normal = torch.randn(shape, generator=generator, device=device)
            timesteps = torch.sigmoid(self.config.loc + self.config.scale * normal)
        timesteps = timesteps * self.config.num_train_timesteps
        if self.config.use_discrete_timesteps:
            timesteps = timesteps.trunc()
        if self.config.use_timestep_transform:
            timesteps = self.transform_timesteps(timesteps, sample.shape[2:].numel())
        return timesteps

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        (1 - t/1000) * data + t/1000 * noise.

        Args:
            original_samples (N, C, X, Y, Z): clean latents.
            noise (N, C, X, Y, Z): standard normal noise.
            timesteps (N,): timesteps, one a sample.
        """
        data_weight = 1 - timesteps.float() / self.config.num_train_timesteps
        data_weight = data_weight.view(-1, *[1] * (original_samples.ndim - 1))
        return (data_weight * original_samples + (1 - data_weight) * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The training target, data minus noise (N, C, X, Y, Z), the same at every timestep."""
        return sample - noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps
