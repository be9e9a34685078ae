"""Prepare a folder of films for training: python scripts/prepare_data.py input=DIR output=DIR [key=value ...]

`input` holds videos (shots are detected, NAME.txt beside NAME.mp4 is its caption) or a manifest.jsonl. `output`
becomes a folder that `data.path=` of train.py reads; open its report.html to look the data over. Run it again after
a kill: it makes only what is missing. Many processes: accelerate launch --num_processes N scripts/prepare_data.py ...
(a GPU each), or torchrun --nproc_per_node N scripts/prepare_data.py device=cpu ...
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.command import command
from data.prepare import PrepareConfig, Process, prepare
from data.sources import find_scenes, vocabulary
from models import EncodersConfig, build_encoders


@dataclass
class Settings(PrepareConfig):
    """prepare.yaml: the stages' settings, and the codec and text encoder that make the cache."""

    encoders: EncodersConfig = field(default_factory=EncodersConfig)


@command("prepare", Settings)
def main(settings: Settings) -> None:
    state = PartialState(cpu=settings.device == "cpu")
    settings = replace(settings, device=str(state.device) if settings.device == "auto" else settings.device)
    found = find_scenes(settings.input)
    encoders = build_encoders(settings.encoders, vocabulary(found))
    codec, text_encoder = encoders.codec.to(settings.device), encoders.text.to(settings.device)
    process = Process(state.process_index, state.num_processes, state.wait_for_everyone)
    prepared = prepare(settings, codec, text_encoder, process, found, encoders.save)
    if not state.is_main_process:
        return
    report = prepared.report
    print(f"{len(report.samples)} samples in {prepared.cache}")
    for kind, count in report.counts().items():
        print(f"  {kind}: {count}")
    print(f"look them over: {Path(settings.output, 'report.html')}")


if __name__ == "__main__":
    main()
