"""The progressive schedule sets chunk size, top_k and drops by training step (paper, table of training runs: chunk
sizes of 10240 -> 1280)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moc.config import MoCConfig
from moc.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A stage sets attention from one step on; null leaves a setting as it was before.

    step: the first step of the stage.
    chunk_tokens: the target size of a chunk. top_k: the chunks that a query routes to.
    drop_off_max, drop_in_rate: the rates of context drop-off and drop-in.
    """

    step: int
    chunk_tokens: int | None = None
    top_k: int | None = None
    drop_off_max: float | None = None
    drop_in_rate: float | None = None

    def __post_init__(self) -> None:
        MoCConfig().override(self.settings())  # checks their limits now and not at step 10,000

    def settings(self) -> dict[str, float | None]:
        """Returns what the stage sets, by the names of `MoCConfig`."""
        return {name: value for name, value in asdict(self).items() if name != "step"}


@dataclass(frozen=True)
class MoCSchedule:
    """A schedule is stages in order of step; before the first one, and with none at all, the config stands as it is.

    Raises UserError where steps do not increase; a stage itself where its settings are out of range.
    """

    stages: Sequence[Stage] = ()

    def __post_init__(self) -> None:
        steps = [stage.step for stage in self.stages]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise UserError(f"schedule steps {steps} must be increasing and not negative")

    def at(self, step: int, config: MoCConfig) -> MoCConfig:
        """Returns the MoC settings of a training step."""
        for stage in self.stages:
            if stage.step <= step:
                config = config.override(stage.settings())
        return config
