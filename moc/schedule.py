"""The progressive schedule: chunk size and top_k by training step (paper, table of training runs: 10240 -> 1280)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moc.config import MoCConfig
from moc.errors import UserError


@dataclass(frozen=True)
class Stage:
    """From `step` on, route over chunks of `chunk_tokens` tokens and take `top_k` of them."""

    step: int
    chunk_tokens: int
    top_k: int

    def __post_init__(self) -> None:
        MoCConfig(chunk_tokens=self.chunk_tokens, top_k=self.top_k)  # its limits, now and not at step 10,000


@dataclass(frozen=True)
class MoCSchedule:
    """Stages in order of step; before the first one, and with none at all, the config stands as it is.

    Raises UserError where steps do not increase; a stage itself where its sizes are out of range.
    """

    stages: Sequence[Stage] = ()

    def __post_init__(self) -> None:
        steps = [stage.step for stage in self.stages]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise UserError(f"schedule steps {steps} must be increasing and not negative")

    def at(self, step: int, config: MoCConfig) -> MoCConfig:
        """The MoC settings of a training step."""
        for stage in reversed(self.stages):
            if step >= stage.step:
                return replace(config, chunk_tokens=stage.chunk_tokens, top_k=stage.top_k)
        return config
