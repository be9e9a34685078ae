"""This module measures on a real film what earlier shots are worth to a shot, by when its characters were last seen."""

import json
import shlex
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from data.loading.dataset import DataConfig, ShotDataset, open_dataset
from data.media.example_shots import FilmShot, block, film_shots, last_seen, scene_id
from evaluation.benchmarks.film_report import write_report
from evaluation.benchmarks.measurements import machine, put_row, read_rows
from evaluation.benchmarks.trainings import train_for
from evaluation.history_worth import SIGMAS, HistoryLosses, expected_sparsity, history_losses
from moc import Sample
from moc.errors import UserError, check_among, check_least, check_seed
from moc.training import Parallel, ParallelConfig, find_checkpoint, read_metrics
from models import load_model
from models.checkpoints.contents import Contents

FOLDS = 4
LENGTH = 8  # shots of a scene
COURSE = "validation/loss_0.8"  # the metric that a run's course shows, with equal noise on all shots
KEY = ("row", "fold", "seed", "steps")  # what tells a row of the record from others
NO_DROPS = ["moc.drop_off_max=0", "moc.drop_in_rate=0"]
ROWS = {
    "dense": ["moc=dense"],
    "moc": [],
    "own_shot": ["moc.top_k=0", *NO_DROPS],
}


@dataclass(frozen=True)
class FilmRowsConfig:
    """These settings say what to train and to test.

    film: the folder of the prepared film; null where there are no rows.
    rows: names among ROWS; without any, the tables of the output's rows are made anew.
    folds: which quarters of the film's blocks are held out, one training each.
    steps: how long each is trained.
    minutes: how long training lasts in this call, at most.
    seed: the seed of training.
    draws: how many draws of noise each shot is tested with.
    settings: those of train.py, for all rows.
    folder: where the runs go.
    output: the record to write.
    device: as in `moc.training.ParallelConfig`.
    """

    film: str | None = None
    rows: list[str] = field(default_factory=lambda: ["dense", "moc", "own_shot"])
    folds: list[int] = field(default_factory=lambda: list(range(FOLDS)))
    steps: int = 300
    minutes: float = 8.0
    seed: int = 0
    draws: int = 4
    settings: list[str] = field(default_factory=list)
    folder: str = "outputs/film"
    output: str = "docs/benchmarks/film.json"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_least(self, "", 1, "steps", "draws")
        check_seed(self, "")
        check_among(self, "rows", ROWS)
        if not self.folds or not set(self.folds) <= set(range(FOLDS)):
            raise UserError(f"folds={self.folds} must be some of {list(range(FOLDS))}")
        if self.rows and self.film is None:
            raise UserError("film is not set; say film=FOLDER, where prepare_data.py put the film")


def write_record(config: FilmRowsConfig) -> None:
    """Trains and tests the rows, and puts each into the record as soon as it is tested."""
    folder, output = Path(config.folder).resolve(), Path(config.output)
    if not config.rows:
        write_report(read_rows(output), output)
        return
    folder.mkdir(parents=True, exist_ok=True)
    parallel = Parallel(ParallelConfig(config.device))
    dataset = open_dataset(DataConfig(path=config.film))
    jobs = [(row, fold) for fold in config.folds for row in config.rows]
    with ThreadPoolExecutor(len(jobs)) as pool:
        trainings = {pool.submit(train, *job, config, folder): job for job in jobs}
        for training in as_completed(trainings):
            row = {"train_minutes": training.result()} | test(*trainings[training], config, folder, dataset, parallel)
            print(json.dumps({name: value for name, value in row.items() if name != "losses"}), flush=True)
            write_report(put_row(output, row, KEY), output)


def held_out_blocks(fold: int) -> list[int]:
    """Returns the blocks of the film that a fold holds out."""
    return list(range(fold, block(len(film_shots()) - 1) + 1, FOLDS))


def run_name(row: str, fold: int, config: FilmRowsConfig) -> str:
    """Returns the name of a training's run."""
    return f"{row}_fold{fold}_seed{config.seed}_{config.steps}"


def arguments(row: str, fold: int, config: FilmRowsConfig) -> list[str]:
    """Returns the settings of train.py for a row and a fold."""
    held_out = ",".join(f'"*b{number:02d}*"' for number in held_out_blocks(fold))
    data = [f"data.path={config.film}", f"data.held_out=[{held_out}]"]
    steps = [f"trainer.num_steps={config.steps}", f"seed={config.seed}"]
    return ["experiment=bunny", *data, *config.settings, *steps, *ROWS[row]]


def train(row: str, fold: int, config: FilmRowsConfig, folder: Path) -> float:
    """Trains, or goes on training, for `config.minutes` at most; returns the minutes it took."""
    name = run_name(row, fold, config)
    words = [*arguments(row, fold, config), f"output={folder}", f"name={name}", "data.workers=1"]
    assert config.film is not None  # rows are refused without it
    words[1] = f"data.path={Path(config.film).resolve()}"
    if config.device != "auto":
        words.append(f"parallel.device={config.device}")
    return round(train_for(config.minutes, words, folder / f"{name}.log"), 2)


def test(row: str, fold: int, config: FilmRowsConfig, folder: Path, dataset: ShotDataset, parallel: Parallel) -> dict:
    """Returns a row of the record: what a checkpoint makes of each held-out shot that has one before it."""
    name = run_name(row, fold, config)
    key = {"row": row, "fold": fold, "seed": config.seed, "steps": config.steps}
    checkpoint = find_checkpoint(folder / name)
    if checkpoint is None:
        return key | {"failed": (folder / f"{name}.log").read_text()[-2000:]}
    contents = Contents(checkpoint)
    model = load_model(checkpoint).to(parallel.device)
    shots = film_shots()
    held_out = held_out_blocks(fold)
    targets = [index for index in range(1, len(shots)) if block(index) in held_out]  # shot 0 has no history
    samples = [sample_of(dataset, index) for index in targets]
    losses = history_losses(model, contents.moc, contents.own_flow, samples, parallel, draws=config.draws)
    metrics = read_metrics(folder / name)
    return key | {
        "steps_done": json.loads((checkpoint / "state.json").read_text())["step"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "moc": contents.moc.to_dict(),
        "sparsity": expected_sparsity(samples, model.stream, contents.moc),
        "train_loss": next((m["loss"] for m in reversed(metrics) if "loss" in m), None),
        "validation": [[m["step"], round(m[COURSE], 5)] for m in metrics if COURSE in m],
        "targets": [target(shots, index) for index in targets],
        "sigmas": list(SIGMAS),
        "losses": as_lists(losses),
        "command": "python " + shlex.join(["train.py", *arguments(row, fold, config)]),
        "machine": machine(parallel),
    }


def sample_of(dataset: ShotDataset, index: int) -> Sample:
    """Returns the scene that ends with shot `index`. Raises UserError where the data lack it."""
    wanted = scene_id(max(0, index + 1 - LENGTH), index)
    for item, (_, scene) in enumerate(dataset.items):
        if scene.id == wanted:
            return dataset[item]
    raise UserError(f"the data hold no scene {wanted}; prepare what scripts/example_film.py writes, with min_frames=1")


def target(shots: list[FilmShot], index: int) -> dict:
    """Returns a held-out shot: its number, and how many shots ago those in it were seen last, the nearest and the
    farthest of them; -1 stands for never before, and null for a shot that shows nobody."""
    ages = [-1 if age is None else age for age in last_seen(shots, index).values()]
    farthest = -1 if -1 in ages else max(ages, default=None)
    known = [age for age in ages if age > 0]
    return {"number": shots[index].number, "nearest": min(known, default=farthest), "farthest": farthest}


def as_lists(losses: HistoryLosses) -> dict[str, list]:
    """Returns losses by kind, [targets][draws][sigmas]."""
    return {
        kind: [[[round(x, 5) for x in row] for row in rows] for rows in getattr(losses, kind).tolist()]
        for kind in ("alone", "history", "other")
    }
