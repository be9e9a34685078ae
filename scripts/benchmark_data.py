"""Measures the loader at the paper's token counts: python scripts/benchmark_data.py folder=DIR [key=value ...]

film=FILE also measures decoding it and finding its shots; truth=[DIR] (a storyworld) and films=[A,B] (joined by known
cuts) measure the accuracy of the cuts found.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.data import DataBenchmarkConfig, write_record


@command("benchmark_data", DataBenchmarkConfig)
def main(config: DataBenchmarkConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
