"""A solver moves a shot along the flow from one noise level to the next: Euler, or a multistep solver of diffusers.

Each shot has a solver of its own, so that shots may stand at different noise levels. A multistep solver remembers the
shot's last predictions; what it remembers is kept with an unfinished film (`Progress.remembered`), which then goes on
with the same bits.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor

ALMOST_NOISE = 1 - 1e-6  # the logarithm of the signal's share in pure noise is infinite


class SolverKind(StrEnum):
    """This setting says how a step from one noise level to the next is taken."""

    euler = "euler"
    unipc = "unipc"
    dpmpp = "dpmpp"


class Euler:
    """This solver takes one straight step after another and remembers nothing."""

    def __init__(self, levels: Tensor) -> None:
        """Takes noise levels from 1 down to 0, float32 [steps + 1]."""
        self.levels = levels

    def step(self, number: int, latent: Tensor, velocity: Tensor) -> Tensor:
        """Returns the latent after step `number`, counted from 0."""
        return latent + float(self.levels[number + 1] - self.levels[number]) * velocity

    def remembered(self) -> dict[str, Tensor]:
        return {}


class Multistep:
    """This solver steps by UniPC (arXiv 2302.04867) or DPM-Solver++ (arXiv 2211.01095) of order 2, in diffusers'
    schedulers."""

    def __init__(
        self, kind: SolverKind, levels: Tensor, number: int = 0, remembered: Mapping[str, Tensor] = {}
    ) -> None:
        """Begins at step `number`, with levels as in `Euler` and what this class `remembered` before it."""
        self.scheduler = scheduler = _scheduler(kind)
        scheduler.set_timesteps(len(levels) - 1)
        scheduler.sigmas = levels.clamp(max=ALMOST_NOISE)
        scheduler.set_begin_index(number)
        order = scheduler.config.solver_order
        scheduler.lower_order_nums = min(number, order)
        outputs = [remembered.get(f"prediction_{age}") for age in reversed(range(order))]
        scheduler.model_outputs = outputs
        if "corrected" in remembered:
            scheduler.last_sample = remembered["corrected"]
            scheduler.this_order = min(order, number, len(levels) - number)

    def step(self, number: int, latent: Tensor, velocity: Tensor) -> Tensor:
        """Returns the latent after step `number`, counted from 0; steps come in order."""
        timestep = self.scheduler.timesteps[number]  # the schedulers count the steps themselves and ignore its value
        return self.scheduler.step(velocity, timestep, latent, return_dict=False)[0]

    def remembered(self) -> dict[str, Tensor]:
        """Returns what the next step needs of those before: predictions, by their age, and the latent that UniPC
        corrects."""
        found = {f"prediction_{age}": x for age, x in enumerate(reversed(self.scheduler.model_outputs))}
        found["corrected"] = getattr(self.scheduler, "last_sample", None)
        return {name: tensor for name, tensor in found.items() if tensor is not None}


Solver = Euler | Multistep


def build_solver(kind: SolverKind, levels: Tensor, number: int, remembered: Mapping[str, Tensor]) -> Solver:
    """Returns a shot's solver before its step `number`, with what it remembered there."""
    if kind is SolverKind.euler:
        return Euler(levels)
    return Multistep(kind, levels, number, remembered)


def _scheduler(kind: SolverKind) -> Any:
    import diffusers  # is imported here, since it takes seconds

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if kind is SolverKind.unipc:
        return diffusers.UniPCMultistepScheduler(**flow)
    return diffusers.DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++")
