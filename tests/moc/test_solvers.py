"""These tests are about solvers: equal to the loops of diffusers, of the order they promise, and resumed with the same
bits."""

from dataclasses import replace
from itertools import pairwise

import diffusers
import pytest
import torch

from moc.diffusion import Flow, SamplingConfig
from moc.diffusion.solvers import Euler, Multistep, SolverKind, build_solver
from tests.moc.test_samplers import FLOW, Recording, entangled, film, story

KINDS = list(SolverKind)
FLOW_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def spiral(x, sigma):
    """Returns a velocity that bends."""
    return torch.stack([x[1] * (1 + sigma), -x[0] + sigma.sin()])


def library(scheduler, x):
    """Returns what the loop of diffusers' pipelines gives."""
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(spiral(x, sigma), timestep, x, return_dict=False)[0]
    return x


def ours(kind, levels, x):
    solver = build_solver(kind, levels, 0, {})
    for number, sigma in enumerate(levels[:-1]):
        x = solver.step(number, x, spiral(x, sigma))
    return x


def test_flow_euler_is_ours():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - step / 7 for step in range(7)])
    x = torch.randn(2, 5)
    torch.testing.assert_close(library(scheduler, x), ours(SolverKind.euler, scheduler.sigmas, x))
    torch.testing.assert_close(scheduler.sigmas, Flow(shift=3.0).shifted(1 - torch.arange(8) / 7))


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("unipc", diffusers.UniPCMultistepScheduler), ("dpmpp", diffusers.DPMSolverMultistepScheduler)],
)
def test_multistep_solvers_are_the_librarys(kind, scheduler, steps):
    scheduler = scheduler(**FLOW_SCHEDULER)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 5)
    levels = scheduler.sigmas.clone()
    torch.testing.assert_close(ours(SolverKind(kind), levels, x), library(scheduler, x))


def gaussian(latents, sigma, _):
    """Returns the velocity of data N(3, 0.5^2): the flow carries noise z to 3 + 0.5 z."""
    gains = [(s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2) for s in sigma]
    return [g * (x - (1 - s) * 3) - 3 for g, x, s in zip(gains, latents, sigma, strict=True)]


@pytest.mark.parametrize(
    ("kind", "lag", "least", "most", "error"),
    [("euler", 1.0, 3.5, 4.5, 0.03), ("unipc", 0.0, 6.0, 20.0, 0.004), ("dpmpp", 0.5, 5.0, 20.0, 0.004)],
)
def test_the_error_of_a_film_falls_as_its_order_says(kind, lag, least, most, error):
    """Four times the steps leave every shot, whatever noise level the others stand at, a quarter of the error, or less
    of the second order (a sixteenth at last: near both ends of the noise levels steps are long to them)."""
    errors = []
    for steps in (40, 160):
        model = Recording(gaussian)
        config = SamplingConfig(steps, solver=SolverKind(kind), lag=lag, guidance_scale=1.0)
        latents = film(model, config, story(2))
        noise = {shot: next(x[shots.index(shot)] for shots, s, x, _ in model.calls if shot in shots) for shot in (0, 1)}
        errors.append(torch.stack([(latent - 3 - 0.5 * noise[shot]).abs().max() for shot, latent in latents]))
    ratio = errors[0] / errors[1]
    assert ((ratio > least) & (ratio < most)).all(), ratio
    assert (errors[1] < error).all(), errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0.0, 0.4, 1.0])
def test_a_story_goes_on_from_any_step_with_the_same_bits(kind, lag):
    config, stops = SamplingConfig(5, solver=kind, lag=lag, guidance_scale=2.0), []
    what = replace(story(3), ends={1: torch.ones(2, 1, 4, 4)})
    whole = film(Recording(entangled), config, what, on_step=stops.append)
    assert len(stops) == {0.0: 5, 0.4: 9, 1.0: 15}[lag]
    for stop in stops[:-1]:
        rest = film(Recording(entangled), config, what, start=stop)
        assert rest
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, whole[-len(rest) :], strict=True))


def test_a_solver_remembers_what_a_new_one_needs():
    levels, x = FLOW.shifted(1 - torch.arange(5) / 4), torch.randn(2, 5)
    for kind in ("unipc", "dpmpp"):
        solver, at = Multistep(SolverKind(kind), levels), x
        for number, (sigma, _) in enumerate(pairwise(levels)):
            again = Multistep(SolverKind(kind), levels, number, solver.remembered())
            velocity = spiral(at, sigma)
            expected = solver.step(number, at, velocity)
            assert torch.equal(again.step(number, at, velocity), expected)
            at = expected
    assert Euler(levels).remembered() == {}


def test_a_solver_that_is_not_known_is_refused(tmp_path, capsys):
    from tests.pipeline import assert_one_message, refusal

    said = refusal(capsys, "sample.py", "checkpoint=x", "script=y", "out=z", "sampler.solver=heun")
    assert_one_message(said, "sampler.solver", "heun")
    assert {kind.value for kind in KINDS} == {"euler", "unipc", "dpmpp"}
