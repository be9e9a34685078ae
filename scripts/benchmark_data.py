"""Measure the loader at the paper's token counts: python scripts/benchmark_data.py folder=DIR [film=FILE]

With film=FILE, also decoding it and finding its shots.
"""

import json
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.command import command
from data.benchmark import DataBenchmarkConfig, measure_decoding, measure_loader, write_random_cache
from data.cache import write_whole


@command("benchmark_data", DataBenchmarkConfig)
def main(config: DataBenchmarkConfig) -> None:
    write_random_cache(config)
    rows = [measure_loader(config)]
    if config.film:
        rows.append(measure_decoding(Path(config.film), config.detector, Path(config.folder, "scans")))
    header = {"cpu": platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__}
    write_whole(Path(config.output), json.dumps({"header": header, "rows": rows}, indent=1).encode())
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
