"""Evaluates a checkpoint, sampled films, or both: python scripts/evaluate.py [checkpoint=PATH data.path=PREPARED]
[films=[FILM, OTHER]] [clip=FOLDER] [dino=FOLDER] [output=FILE.json] [page=FILE.html] [key=value ...]

It measures a checkpoint's held-out loss under dense, MoC and own-shot-only attention, at the same noise. MoC has no
parameters, so a dense checkpoint runs with it untrained (zero-shot) and the other way round. With equal noise on all
shots the rows barely differ; a clean history before one noisy shot tells what the history is worth. `accelerate launch`
deals the scenes to its processes. With recall={} the scenes are those of experiment=recall, composed without a disk.

In films that sample.py wrote it measures cuts, motion, drift, whether looks stay within a shot and come back with their
names, and with local weights text alignment. VBench runs in an environment of its own: its command is
printed, and vbench=[RESULT, ...], one for each film, puts its numbers beside the paper's.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from tqdm import tqdm

from configs.command import command
from configs.run_record import EVALUATED, evaluated
from configs.world import world_of
from data.loading.dataset import DataConfig, open_dataset
from data.loading.endless import EndlessLoader
from data.loading.loader import held_out
from data.prepare.shots import build_detector
from data.records import write_whole
from data.storyworld.recall_scenes import RecallConfig
from evaluation.films.comparison_page import Board, board, told, write_page
from evaluation.films.features import Clip, ColourHistogram, Dino, Features
from evaluation.films.published import read_vbench, vbench_command
from evaluation.films.scores import measure, scores
from evaluation.films.shown import find_films, open_film, read_schedule
from evaluation.rivals import compare
from moc import Execution, MoCConfig
from moc.errors import UserError, check_least
from moc.files import check_writable
from moc.training import MeshConfig, Parallel, ParallelConfig
from models import Contents, load_codec, load_model, move_model


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
        if self.vbench and len(self.vbench) != len(self.films):
            raise UserError(f"vbench has {len(self.vbench)} results for {len(self.films)} films; name one for each")


@command("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    if not config.checkpoint and not config.films:
        raise UserError("say checkpoint=PATH data.path=PREPARED, or films=[FOLDER, ...], or both")
    for file in filter(None, (config.output, config.page)):
        check_writable(Path(file))
    vbench: dict[str, dict[str, float]] = {name: {} for name in config.films}
    vbench |= {name: read_vbench(result) for name, result in zip(config.films, config.vbench, strict=False)}
    parallel = Parallel(ParallelConfig(config.device, config.precision, **asdict(config.parallel)))
    losses = losses_of(Contents.sound(config.checkpoint), config, parallel) if config.checkpoint else []
    if not parallel.is_main:
        return
    judged, boards = judge(config, parallel) if config.films else ([], [])
    if config.films and not config.vbench:
        films = [film for name in config.films for film in find_films(name)]
        print(f"VBench's six, where it is installed: {vbench_command(films)}")
    if config.output:
        record = {"losses": losses, "films": judged, "vbench": vbench}
        write_whole(Path(config.output), (json.dumps(record, indent=1) + "\n").encode())
    if config.page:
        write_page(Path(config.page), losses, judged, boards, vbench)
        print(f"look at {config.page}")


def losses_of(contents: Contents, config: EvaluateConfig, parallel: Parallel) -> list[dict]:
    """Returns the rows of the checkpoint under rival attentions."""
    model = load_model(contents)
    move_model(model, parallel)
    model.execution = config.execution
    moc, share = contents.moc.override(config.moc), (parallel.data_rank, parallel.data_ranks)
    if config.recall:
        world, scenes = world_of(contents, config.recall, parallel.device), config.data.validation or EVALUATED
        limits = config.data.batch_tokens, scenes
        loader = EndlessLoader(world, model.stream, moc.chunk_tokens, *limits, rank=share[0], world_size=share[1])
        batches = list(loader.held_out(at_once=1))
    else:
        data = evaluated(config.data, contents.root)
        dataset = open_dataset(data, load_codec)
        batches = list(held_out(dataset, data.validation, model.stream, moc.chunk_tokens, *share))
    rows = []
    for row in compare(model, moc, contents.own_flow, batches, config.seed, parallel, config.draws):
        rows.append(row.record())
        if parallel.is_main:
            print(row.line, flush=True)
    return rows


def judge(config: EvaluateConfig, parallel: Parallel) -> tuple[list[dict], list[list[Board]]]:
    """Returns the scores of each of `config.films`, and the storyboards of its films."""
    schedule = read_schedule(config.schedule) if config.schedule else None
    clip = Clip(config.clip, parallel.device) if config.clip else None
    given: list[Features | None] = [Dino(config.dino, parallel.device) if config.dino else None, clip]
    features = [one for one in given if one] or [ColourHistogram()]
    detector = build_detector("transnetv2", device=str(parallel.device))
    rows, boards = [], []
    for name in config.films:
        measured, drawn = [], []
        for folder in tqdm(find_films(name), desc=name, disable=None):
            film = open_film(folder, schedule)
            measured.append(measure(film, features, clip, detector))
            drawn.append(board(film))
        rows.append(scores(name, measured))
        boards.append(drawn)
        print(told(rows[-1]), flush=True)
    return rows, boards


if __name__ == "__main__":
    main()
