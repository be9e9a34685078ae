"""This module evaluates a checkpoint, sampled films, or both: held-out losses under rival attentions, and scores of
films."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from data.loading.dataset import DataConfig, open_dataset
from data.loading.endless import EndlessLoader, RecallWorld
from data.loading.loader import held_out
from data.prepare.shots import build_detector
from data.records import write_whole
from data.storyworld.recall_scenes import RecallConfig
from evaluation.films.comparison_page import Board, board, told, write_page
from evaluation.films.features import Clip, ColourHistogram, Dino, Features
from evaluation.films.published import read_vbench, vbench_command
from evaluation.films.scores import measure, scores
from evaluation.films.shown import film_folders, open_film, read_schedule
from evaluation.rivals import compare
from moc import Execution, MoCConfig, StreamSpec
from moc.batch import Batch
from moc.counts import count_of
from moc.errors import Refusals, UserError, check_least, check_seed
from moc.files import check_writable
from moc.training import MeshConfig, Parallel, ParallelConfig
from models import Contents, load_codec, load_model, move_model

logger = logging.getLogger(__name__)

NUM_SCENES = 16  # where no setting says how many
WorldOf = Callable[[Contents, RecallConfig, torch.device], RecallWorld]  # the world that a checkpoint is evaluated on


@dataclass
class EvaluateConfig:
    """These settings say what to evaluate and how.

    checkpoint: a run's folder, a checkpoint, or a model folder; null evaluates films alone.
    films: folders that sample.py wrote, or folders of such folders, whose films are taken together.
    schedule: a JSON or YAML file with `shots`, the names that each shot shows; null takes a benchmark script's
        entities (EntityBench, MSR-50), or finds in the prompts the names of the global caption's [character] part.
    clip, dino: local folders with weights; where both are null, pictures are compared by a histogram of their colours.
    vbench: for each film what VBench wrote, a file or a folder; empty only tells how to run it.
    output: a file for the numbers, as JSON; null only prints them.
    page: a file for the report, as HTML; null writes none.
    device, precision: as in `moc.training.ParallelConfig`.
    parallel: what processes do together.
    seed: the seed of the noise.
    draws: how often noise is drawn.
    moc: settings of attention; null takes the checkpoint's.
    execution: how attention is computed.
    recall: the world of recall scenes, in place of data.path, whose data.validation scenes, or 16, no training sees.
    data: the scenes, of which data.validation are evaluated; 0 takes those that the run held out, where it was trained
        on the same data, and otherwise 16.
    """

    checkpoint: str | None = None
    films: list[str] = field(default_factory=list)
    schedule: str | None = None
    clip: str | None = None
    dino: str | None = None
    vbench: list[str] = field(default_factory=list)
    output: str | None = None
    page: str | None = None
    device: str = "auto"
    precision: str = "auto"
    parallel: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    draws: int = 1
    moc: dict[str, Any] = field(default_factory=MoCConfig.unset)
    execution: Execution = field(default_factory=Execution)
    recall: RecallConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_least(self, "", 1, "draws")
        check_seed(self, "")
        if self.recall and (self.data.path or self.data.sources):
            raise UserError("recall is set together with data.path or data.sources; set one of them")
        if self.vbench and len(self.vbench) != len(self.films):
            raise UserError(f"vbench has {len(self.vbench)} results for {len(self.films)} films; name one for each")


def evaluate(config: EvaluateConfig, world_of: WorldOf) -> None:
    """Prints the held-out losses of the config's checkpoint and the scores of its films, and writes them where it says.

    Every process of a launch takes part in the losses; the first one judges films and writes. Raises UserError where
    there is nothing to evaluate or a file cannot be written, and what opening a checkpoint, data or a film raises.
    """
    if not config.checkpoint and not config.films:
        raise UserError("say checkpoint=PATH with data.path=PREPARED or recall={}, or films=[FOLDER, ...], or both")
    for file in filter(None, (config.output, config.page)):
        check_writable(Path(file))
    vbench: dict[str, dict[str, float]] = {name: {} for name in config.films}
    vbench |= {name: read_vbench(result) for name, result in zip(config.films, config.vbench, strict=False)}
    parallel = Parallel(ParallelConfig(config.device, config.precision, **asdict(config.parallel)))
    refusals = Refusals()
    found = {name: film_folders(name, refusals) for name in config.films}
    refusals.tell()
    losses = _losses(Contents.sound(config.checkpoint), config, parallel, world_of) if config.checkpoint else []
    if not parallel.is_main:
        return
    judged, boards = _judge(config, found, parallel.device) if found else ([], [])
    if found and not config.vbench:
        films = [film for folders in found.values() for film in folders]
        print(f"VBench's six, where it is installed: {vbench_command(films)}")
    if config.output:
        record = {"losses": losses, "films": judged, "vbench": vbench}
        write_whole(Path(config.output), (json.dumps(record, indent=1) + "\n").encode())
    if config.page:
        write_page(Path(config.page), losses, judged, boards, vbench)
        print(f"look at {config.page}")


def _losses(contents: Contents, config: EvaluateConfig, parallel: Parallel, world_of: WorldOf) -> list[dict]:
    """Returns the rows of a checkpoint under rival attentions, each printed as soon as it is known."""
    model = load_model(contents)
    move_model(model, parallel)
    model.execution = config.execution
    moc, rows = contents.moc.override(config.moc), []
    batches = _batches(contents, config, model.stream, moc.chunk_tokens, parallel, world_of)
    for row in compare(model, moc, contents.own_flow, batches, config.seed, parallel, config.draws):
        rows.append(row.record())
        if parallel.is_main:
            print(row.line, flush=True)
    return rows


def _batches(
    contents: Contents,
    config: EvaluateConfig,
    spec: StreamSpec,
    chunk_tokens: int,
    parallel: Parallel,
    world_of: WorldOf,
) -> list[Batch]:
    """Returns the share of one process of the scenes that are evaluated, a batch for each."""
    rank, ranks = parallel.data_rank, parallel.data_ranks
    if config.recall:
        world = world_of(contents, config.recall, parallel.device)
        limits = config.data.batch_tokens, config.data.validation or NUM_SCENES
        loader = EndlessLoader(world, spec, chunk_tokens, *limits, rank=rank, world_size=ranks)
        return list(loader.held_out(at_once=1))
    data = with_scenes(config.data, contents.root)
    return list(held_out(open_dataset(data, load_codec), data.validation, spec, chunk_tokens, rank, ranks))


def with_scenes(data: DataConfig, checkpoint: Path) -> DataConfig:
    """Returns the data with the scenes that are evaluated, where `data.validation` does not say how many: those that
    the run held out, if it was trained on the same data, and otherwise 16. Tells which.

    checkpoint: its folder, in that of its run, whose config.yaml says what it was trained on.
    """
    if data.validation or not (data.path or data.sources):
        return data
    file = checkpoint.resolve().parent.parent / "config.yaml"
    settings: Any = OmegaConf.load(file) if file.is_file() else {}
    trained = settings.get("data")
    is_same = bool(trained) and _data_paths(trained) == _data_paths(OmegaConf.structured(data))
    number, names = (trained.get("validation", 0), list(trained.get("held_out", []))) if is_same else (0, [])
    if not is_same:
        whose = "of other data than the run's"
    elif data.held_out and data.held_out != names:
        whose = f"of data.held_out={data.held_out}, other than the run held out"
    else:
        whose = "that the run held out" if number or names else "that the run was trained on, as it held out none"
    most = count_of(number or NUM_SCENES, "scene")
    logger.info("evaluated on up to %s %s; data.validation=NUMBER takes another number", most, whose)
    return replace(data, validation=number or NUM_SCENES, held_out=data.held_out or names)


def _data_paths(data: DictConfig) -> set[str]:
    """Returns where a config's data lie: URLs, and whole paths of folders."""
    paths = [source.path for source in data.get("sources") or []] or [data.get("path")]
    return {path if "://" in path else str(Path(path).resolve()) for path in paths if path}


def _judge(
    config: EvaluateConfig, found: dict[str, list[Path]], device: torch.device
) -> tuple[list[dict], list[list[Board]]]:
    """Returns the scores of each of `config.films`, and the storyboards of its films. found: their folders."""
    schedule = read_schedule(config.schedule) if config.schedule else None
    clip = Clip(config.clip, device) if config.clip else None
    given: list[Features | None] = [Dino(config.dino, device) if config.dino else None, clip]
    features = [one for one in given if one] or [ColourHistogram()]
    detector = build_detector("transnetv2", device=str(device))
    rows, boards = [], []
    for name, folders in found.items():
        measured, drawn = [], []
        for folder in tqdm(folders, desc=name, disable=None):
            film = open_film(folder, schedule)
            measured.append(measure(film, features, clip, detector))
            drawn.append(board(film))
        rows.append(scores(name, measured))
        boards.append(drawn)
        print(told(rows[-1]), flush=True)
    return rows, boards
