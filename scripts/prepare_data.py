"""Prepares a folder of films for training: python scripts/prepare_data.py input=DIR output=DIR [key=value ...]

`input` holds videos (shots are detected, NAME.txt beside NAME.mp4 is its caption) or a manifest.jsonl. `output`
becomes a folder that `data.path=` of train.py reads; open its report.html to look the data over. Run it again after
a kill: it makes only what is missing. Many processes share the work, a GPU each or on the CPU (device=cpu):
accelerate launch --multi_gpu --num_processes N scripts/prepare_data.py ...; for many hosts see docs/data.md.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from data.prepare.pipeline import prepare
from data.prepare.ranks import joined
from data.prepare.settings import PrepareConfig
from data.prepare.sources import find_scenes, vocabulary
from moc.counts import count_of
from moc.training import Parallel, ParallelConfig
from models import EncodersConfig, build_encoders


@dataclass
class PrepareDataConfig(PrepareConfig):
    """These settings say how the stages run, and what encodes the cache.

    device: as in `moc.training.ParallelConfig`.
    encoders: the codec and the text encoder.
    """

    device: str = "auto"
    encoders: EncodersConfig = field(default_factory=EncodersConfig)


@command("prepare", PrepareDataConfig)
def main(config: PrepareDataConfig) -> None:
    parallel = Parallel(ParallelConfig(config.device))
    device = str(parallel.device)
    found = find_scenes(config.input, config.output)
    encoders = build_encoders(config.encoders, vocabulary(found))
    codec, text_encoder = encoders.codec.to(device), encoders.text.to(device)
    prepared = prepare(config, codec, text_encoder, joined(), found, encoders.save, device=device)
    if not parallel.is_main:
        return
    report = prepared.report
    print(f"{count_of(len(report.samples), 'sample')} in {prepared.cache}")
    for line in report.told():
        print(f"  {line}")
    print(f"look them over: {Path(config.output, 'report.html')}")


if __name__ == "__main__":
    main()
