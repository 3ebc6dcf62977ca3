"""diffusers' solvers on a flow with a known solution, and in the pipeline."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from maisi_diffusers import MaisiRFlowScheduler
from maisi_diffusers.schedulers.flow_solvers import integrates_flow, set_timesteps
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline, seeded

SOLVERS = {
    "maisi": (MaisiRFlowScheduler, {}, 1),
    "euler": (FlowMatchEulerDiscreteScheduler, {}, 1),
    "heun": (FlowMatchHeunDiscreteScheduler, {}, 2),
    "unipc": (UniPCMultistepScheduler, {}, 2),
    "dpm-solver": (DPMSolverMultistepScheduler, {}, 2),
    "dpm-solver of order 1": (DPMSolverMultistepScheduler, {"solver_order": 1}, 1),
}
MEAN, STD = 0.7, 0.4


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[data - noise | x] for normal data: the exact rectified-flow model of it."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    score = (x - (1 - sigma) * MEAN) / variance
    return MEAN + (1 - sigma) * STD**2 * score - sigma * score


def solve(name: str, steps: int, numel: int) -> float:
    """Largest error of the data that a solver makes from noise; along the flow, each noise is one of normal data."""
    solver_class, options, _ = SOLVERS[name]
    scheduler = solver_class.from_config(MaisiRFlowScheduler().config, **options)
    noise = torch.randn(1, 1, 8, 8, 8, generator=seeded())
    x = noise
    model_timesteps = set_timesteps(scheduler, steps, torch.device("cpu"), numel)
    scheduler.set_begin_index(0)
    for t, model_t in zip(scheduler.timesteps, model_timesteps, strict=True):
        output = velocity(x.double(), model_t.item() / 1000)
        if not isinstance(scheduler, MaisiRFlowScheduler):
            output = -output  # theirs points to the noise
        x = scheduler.step(output.float(), t, x, return_dict=False)[0]
    return (x - (MEAN + STD * noise)).abs().max().item()


@pytest.mark.parametrize("numel", [16**3, 32**3, 48**3])
@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name, numel):
    order = SOLVERS[name][2]
    # Few enough for float32 not to be the limit, many enough for the order to show.
    fewest = {"heun": 40, "unipc": 80, "dpm-solver": 160}.get(name, 40)
    errors = [solve(name, fewest * factor, numel) for factor in (1, 2, 4)]
    observed = math.log2(errors[0] / errors[2]) / 2
    assert observed > order - 0.35, f"order {observed:.2f}, errors {errors}"
    assert errors[-1] < {1: 0.05, 2: 1e-3}[order]
    if order == 1:
        assert observed < 1.3


def test_first_order_solvers_are_the_same():
    """Euler in sigma, and DPM-Solver's first order, are MAISI's own step."""
    for steps in (5, 30):
        reference = solve("maisi", steps, 24**3)
        assert solve("euler", steps, 24**3) == pytest.approx(reference, rel=1e-4)
        assert solve("dpm-solver of order 1", steps, 24**3) == pytest.approx(reference, rel=1e-3)


def test_monai_rounding_does_not_converge():
    """Why it can be switched off: its step sizes do not add up."""
    errors = {}
    for rounding in (False, True):
        scheduler = MaisiRFlowScheduler(monai_rounding=rounding)
        scheduler.set_timesteps(300, input_img_size_numel=32**3)
        x = noise = torch.randn(1, 1, 8, 8, 8, generator=seeded())
        for t in scheduler.timesteps:
            x = scheduler.step(velocity(x, t.item() / 1000), t, x).prev_sample
        errors[rounding] = (x - (MEAN + STD * noise)).abs().max()
    assert errors[False] < 0.02 < 0.05 < errors[True]


@pytest.mark.parametrize("name", SOLVERS)
def test_config_carries_over(name, tmp_path):
    """There, through a file, and back."""
    own = MaisiRFlowScheduler(base_img_size_numel=4096, monai_rounding=True)
    own.save_pretrained(tmp_path / "own")
    solver_class, options, _ = SOLVERS[name]
    solver = solver_class.from_pretrained(tmp_path / "own", **options)
    assert integrates_flow(solver)
    solver.save_pretrained(tmp_path / "solver")
    solver = solver_class.from_pretrained(tmp_path / "solver")
    assert integrates_flow(solver)
    back = MaisiRFlowScheduler.from_config(solver.config)
    assert {k: v for k, v in own.config.items() if not k.startswith("_")}.items() <= back.config.items()
    assert solver_class in MaisiRFlowScheduler().compatibles or name == "maisi"


@pytest.fixture(scope="module")
def exact():
    """A pipeline, a call and the latents of it in many exact steps."""
    pipe = make_pipeline("rflow-ct")
    pipe.scheduler = MaisiRFlowScheduler()
    arguments = {"mask": make_label_map(), "output_type": "latent"}
    return pipe, arguments, pipe(**arguments, generator=seeded(), num_inference_steps=200).images


@pytest.mark.parametrize("name", SOLVERS)
def test_pipeline_runs_with_each(name, exact):
    """All go to the same image; solvers of second order are nearer in as many steps."""
    pipe, arguments, truth = exact
    solver_class, options, order = SOLVERS[name]
    pipe.scheduler = solver_class.from_config(pipe.scheduler.config, **options)
    found = pipe(**arguments, generator=seeded(), num_inference_steps=40).images
    error = (found - truth).norm() / truth.norm()
    assert error < {1: 0.1, 2: 0.05}[order], f"{error:.3f}"


def test_a_schedule_of_its_own_is_left_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = set_timesteps(scheduler, 4, torch.device("cpu"), 8**3)
    expected = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected.set_timesteps(4)
    np.testing.assert_allclose(timesteps, expected.timesteps)
    pipe = make_pipeline("rflow-ct")
    pipe.scheduler = scheduler
    arguments = {"image_only": True, "output_size": SIZE, "spacing": SPACING}
    assert torch.isfinite(pipe(**arguments, generator=seeded(), output_type="latent").images).all()


def test_half_precision_step():
    scheduler = MaisiRFlowScheduler()
    scheduler.set_timesteps(2, input_img_size_numel=32**3)
    sample = torch.randn(2, 4, 4, 4, 4)
    step = scheduler.step(torch.ones_like(sample).bfloat16(), scheduler.timesteps[0], sample.bfloat16())
    assert step.prev_sample.dtype == torch.bfloat16
    torch.testing.assert_close(step.prev_sample, (sample.bfloat16().float() + 0.5).bfloat16())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaisiRFlowScheduler(sample_method="cosine"), "'cosine'.*'uniform' or 'logit-normal'"),
        (lambda: MaisiRFlowScheduler(prediction_type="epsilon"), "'epsilon'"),
        (lambda: MaisiRFlowScheduler().set_timesteps(0, input_img_size_numel=8), "=0 is not allowed"),
        (lambda: MaisiRFlowScheduler().set_timesteps(1001, input_img_size_numel=8), "1001"),
        (lambda: MaisiRFlowScheduler().set_timesteps(30), "input_img_size_numel"),
        (lambda: MaisiRFlowScheduler().step(torch.zeros(1), 1000.0, torch.zeros(1)), "set_timesteps"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
