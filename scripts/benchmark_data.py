"""Measures the loader at the paper's token counts: python scripts/benchmark_data.py folder=DIR [key=value ...]

film=FILE also measures decoding it and finding its shots; truth=[DIR] (a storyworld) and films=[A,B] (joined by known
cuts) measure the accuracy of the cuts found.
"""

import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

import torch

from configs.command import command
from data.records import write_whole
from evaluation.benchmarks.data import (
    DataBenchmarkConfig,
    join_films,
    measure_cuts,
    measure_decoding,
    measure_loader,
    write_random_cache,
)


@command("benchmark_data", DataBenchmarkConfig)
def main(config: DataBenchmarkConfig) -> None:
    write_random_cache(config)
    rows = [measure_loader(config)]
    folder = Path(config.folder)
    truths = [Path(truth) for truth in config.truth]
    if config.films:
        truths.append(join_films([Path(film) for film in config.films], folder / "joined"))
    for detector in config.detectors:
        if config.film:
            rows.append(measure_decoding(Path(config.film), detector, folder / "scans"))
        rows += [measure_cuts(truth, detector, folder / "scans") for truth in truths]
    header = {"cpu": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__}
    write_whole(Path(config.output), json.dumps({"header": header, "rows": rows}, indent=1).encode())
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
