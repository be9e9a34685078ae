"""Measures how much memory a training step of an adapter takes on one GPU, and how long.

python scripts/benchmark_memory.py [limit_gib=23] [model.lora_base=fp8] [parallel.swap_blocks=40] [shots=4]

By default the trainer takes steps on the shape of an expert of Wan2.2-T2V-A14B and a film of four shots of 57 frames of
480x832, 93,600 tokens, as experiment=wan_a14b_high_24gb does. The weights are random, drawn one at a time and kept at
once in their format. Every call adds its row to the record, or replaces the one of the same settings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.memory import MemoryConfig, write_record


@command("benchmark_memory", MemoryConfig)
def main(config: MemoryConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
