"""Measures how far the demo is from failing: it runs demos of several seeds and environments at once on the CPU.

python scripts/benchmark_demo.py [seeds=N] [processes=N] [environments=[...]] [folder=DIR] [output=FILE]

A demo runs for each seed in each environment, one thread each. Its row (its verdict, its CPU-minutes, the seconds of
its stages) is printed and added to the output as soon as it is done, so that a run that was stopped still tells. The
exit status is 1 where a demo failed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.demo import DemoSeedsConfig, write_record


@command("benchmark_demo", DemoSeedsConfig)
def main(config: DemoSeedsConfig) -> None:
    if write_record(config):
        sys.exit(1)


if __name__ == "__main__":
    main()
