"""Prepare a folder of films for training: python scripts/prepare_data.py input=DIR output=DIR [key=value ...]

`input` holds videos (shots are detected, NAME.txt beside NAME.mp4 is its caption) or a manifest.jsonl. `output`
becomes a folder that `data.path=` of train.py reads; open its report.html to look the data over. Run it again after
a kill: it makes only what is missing. Many processes: accelerate launch --num_processes N scripts/prepare_data.py ...
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from accelerate import PartialState
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.schema import ConfigError, parse
from data.errors import DataError
from data.prepare import PrepareConfig, Process, prepare
from data.sources import find_scenes, vocabulary
from models import ModelConfig, build_codec, build_text_encoder
from models.text import TextKind


@dataclass
class Settings(PrepareConfig):
    """prepare.yaml: the stages' settings, and the model whose codec and text encoder make the cache."""

    model: ModelConfig = field(default_factory=ModelConfig)


@hydra.main(config_path="../configs", config_name="prepare", version_base=None)
def main(cfg: DictConfig) -> None:
    try:
        run(parse(cfg, Settings))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


def run(settings: Settings) -> None:
    state = PartialState()
    found = find_scenes(settings.input)
    codec = build_codec(settings.model.codec).to(settings.device)
    text_encoder = build_text_encoder(settings.model.text, vocabulary(found)).to(settings.device)
    process = Process(state.process_index, state.num_processes, state.wait_for_everyone)
    prepared = prepare(settings, codec, text_encoder, process, found)
    if not state.is_main_process:
        return
    if settings.model.text.kind is TextKind.embedded:
        text_encoder.save(Path(settings.output, "text_encoder"))
    report = prepared.report
    print(f"{len(report.samples)} samples in {prepared.cache}")
    for kind, count in report.counts().items():
        print(f"  {kind}: {count}")
    print(f"look them over: {Path(settings.output, 'report.html')}")


if __name__ == "__main__":
    main()
