"""This module types the configuration of the commands that compose the whole project; YAML beside it holds what groups
change."""

from dataclasses import dataclass, field
from pathlib import Path

from data.loading.dataset import DataConfig
from film.filmmaker import FilmmakerConfig
from moc import Execution, MoCConfig
from moc.diffusion import Flow
from moc.errors import UserError, check_seed
from moc.files import OutsideError, inside
from moc.schedule import Stage
from moc.training import OptimConfig, ParallelConfig, TrackerConfig, TrainerConfig
from models import EncodersConfig, ModelConfig


@dataclass
class TrainConfig:
    """These settings say what `train.py` does.

    name: the run's name.
    output: the folder of runs; this one's is output/name.
    seed: the seed of every random draw.
    resume: auto (the run's newest checkpoint, if there is one), none (the run has no checkpoint yet), or the path of a
        checkpoint or of another run, to begin from until this run has a checkpoint of its own.
    allow_changes: settings, or groups of them, that may differ from those that a resumed run began with.
    preflight: whether only to look if the run can start, and what it will take.
    model: the model and its sizes.
    moc: what attention attends to.
    schedule: the settings of attention that change during the run.
    data: the samples of a step.
    encoders: those of data.recall; prepared data have their own.
    flow: the noise levels that are trained on.
    optim: the optimizer and its learning rate.
    parallel: the device, and how a step is spread.
    execution: how attention is computed.
    trainer: how long the run is and how often it reports.
    tracking: where metrics go besides the run's folder.
    """

    name: str = "run"
    output: str = "outputs"
    seed: int = 0
    resume: str = "auto"
    allow_changes: list[str] = field(default_factory=list)
    preflight: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    moc: MoCConfig = field(default_factory=MoCConfig)
    schedule: list[Stage] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    flow: Flow = field(default_factory=Flow)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    execution: Execution = field(default_factory=Execution)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackerConfig = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        check_seed(self, "")
        for name in ("name", "output"):
            if not getattr(self, name).strip():
                raise UserError(f"{name} is empty; the run's folder is output/name, so say {name}=VALUE")
        try:
            is_output = self.run_folder == Path(self.output)
        except OutsideError as error:
            raise UserError(f"name={error}") from None
        if is_output:
            raise UserError(f"name={self.name} is the output folder itself; name a folder in it")
        if self.trainer.sample_every and self.data.recall:
            raise UserError("trainer.sample_every needs prepared data; set it to 0 with data.recall")

    @property
    def run_folder(self) -> Path:
        return inside(self.output, self.name)


@dataclass
class SampleConfig(FilmmakerConfig):
    """These settings say what `sample.py` does.

    script: the file that says what to film, or a folder of such files.
    out: the folder to write; of several scripts each has a folder of its name in it.
    size, fps: those of the film; null takes the script's, or where it has none those of the films that the model was
    trained on.
    redo: numbers of shots, from 1, of a whole film in `out` that are made anew, with another prompt or seed.
    dry_run: tell what the films will cost, and make none.
    sampler: how shots are sampled.
    """

    script: str = field(kw_only=True)
    out: str = field(kw_only=True)
    size: list[int] | None = None
    fps: float | None = None
    redo: list[int] = field(default_factory=list)
    dry_run: bool = False
