"""Held-out loss of one checkpoint under dense, MoC and own-shot-only attention, at the same noise:
python scripts/evaluate.py checkpoint=PATH data.path=PREPARED [key=value ...], or with `accelerate launch`, which deals
the scenes to the processes.

MoC has no parameters, so a dense checkpoint runs with it untrained (zero-shot) and the other way round. With equal
noise on all shots the rows barely differ; a clean history before one noisy shot tells what the history is worth.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.command import command
from data.loading.dataset import DataConfig, open_dataset
from data.loading.loader import held_out
from data.records import write_whole
from evaluation.rivals import compare
from moc import MoCConfig
from moc.errors import UserError
from moc.training import MeshConfig, Parallel, ParallelConfig
from models import Contents, load_model, place


@dataclass
class EvaluateConfig:
    """What to evaluate and how.

    checkpoint: a run's folder, a checkpoint, or a model folder.
    output: a file for the rows, as JSON; empty only prints them.
    device, precision: as in `moc.training.ParallelConfig`.
    parallel: what processes do together.
    seed: the seed of the noise.
    moc: settings of attention; null takes the checkpoint's.
    data: the scenes, of which data.validation are held out and evaluated.
    """

    checkpoint: str = ""
    output: str = ""
    device: str = "auto"
    precision: str = "auto"
    parallel: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    moc: dict[str, Any] = field(default_factory=MoCConfig.unset)
    data: DataConfig = field(default_factory=DataConfig)


@command("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    if not config.checkpoint:
        raise UserError("checkpoint is not set; say checkpoint=PATH data.path=PREPARED")
    parallel = Parallel(ParallelConfig(config.device, config.precision, **asdict(config.parallel)))
    contents = Contents.sound(config.checkpoint)
    model = load_model(contents)
    place(model, parallel)
    moc, share = contents.moc.override(config.moc), (parallel.data_rank, parallel.data_ranks)
    dataset = open_dataset(config.data)
    batches = list(held_out(dataset, config.data.validation, model.stream, moc.chunk_tokens, *share))
    rows = []
    for row in compare(model, moc, contents.own_flow, batches, config.seed, parallel):
        rows.append(asdict(row))
        if parallel.is_main:
            print(row.line, flush=True)
    if config.output and parallel.is_main:
        write_whole(Path(config.output), (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
