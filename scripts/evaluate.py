"""Held-out loss of one checkpoint under dense, MoC and own-shot-only attention, at the same noise:
python scripts/evaluate.py checkpoint=PATH data.path=PREPARED [key=value ...]

MoC has no parameters, so a dense checkpoint runs with it untrained (zero-shot) and the other way round. With equal
noise on all shots the rows barely differ; a clean history before one noisy shot tells what the history is worth.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


from configs.command import command
from data.loading.dataset import DataConfig, open_dataset
from data.loading.loader import held_out
from data.records import write_whole
from moc import MoCConfig
from moc.errors import UserError
from moc.training import Parallel, ParallelConfig, Validator, rivals, sound_checkpoint
from models import load_model
from models.checkpoints.contents import read_flow, read_settings


@dataclass
class EvaluateConfig:
    """What to evaluate and how.

    checkpoint: a run's folder, a checkpoint, or a model folder.
    output: a file for the rows, as JSON; empty only prints them.
    device, precision: as in `moc.training.ParallelConfig`.
    seed: the seed of the noise.
    moc: settings of attention; null takes the checkpoint's.
    data: the scenes, of which data.validation are held out and evaluated.
    """

    checkpoint: str = ""
    output: str = ""
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    moc: dict[str, Any] = field(default_factory=MoCConfig.unset)
    data: DataConfig = field(default_factory=DataConfig)


@command("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    if not config.checkpoint:
        raise UserError("checkpoint is not set; say checkpoint=PATH data.path=PREPARED")
    parallel = Parallel(ParallelConfig(config.device, config.precision))
    checkpoint = sound_checkpoint(config.checkpoint, "ema") or Path(config.checkpoint)
    model = load_model(checkpoint).to(parallel.device)
    moc, flow = read_settings(checkpoint)[0].override(config.moc), read_flow(checkpoint)
    batches = list(held_out(open_dataset(config.data), config.data.validation, model.stream, moc.chunk_tokens))

    rows = []
    for history in (False, True):
        validator = Validator(batches, flow, seed=config.seed, clean_history=history)
        for name, attention in rivals(moc).items():
            sums = validator.losses(model, attention, parallel)
            losses = dict(zip(validator.sigmas, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
            sparsity = validator.routing(model, attention, parallel)["sparsity"]
            rows.append({"attention": name, "clean_history": history, "sparsity": sparsity, "loss": losses})
            show(rows[-1])
    if config.output:
        write_whole(Path(config.output), (json.dumps(rows, indent=1) + "\n").encode())


def show(row: dict) -> None:
    history = "clean history, last shot" if row["clean_history"] else "equal noise, all shots  "
    losses = "  ".join(f"sigma {sigma:g}: {loss:.4f}" for sigma, loss in row["loss"].items())
    print(f"{history}  {row['attention']:<14} sparsity {row['sparsity']:.0%}  {losses}", flush=True)


if __name__ == "__main__":
    main()
