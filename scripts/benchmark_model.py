"""Measures whole models on one GPU, dense against MoC, side by side in one run.

python scripts/benchmark_model.py [shots=[1,2,4,8]] [output=docs/benchmarks/model]

The shape of Wan2.1-T2V-1.3B with random weights, fp32 under bf16 autocast, shots of 23,040 tokens:
- forward: one prediction, without gradients
- training step: loss, backward with activation checkpointing, clipping, AdamW
dense is the fastest dense kernel present; MoC routes to 5 chunks of 1,280 tokens, drops included in training.
It also compares one block without its attention with what it must cost: its matmuls, timed apart, plus the bytes that
its pointwise operations must move, at the speed of a copy.

Writes OUTPUT.json (a header and rows), OUTPUT.md and OUTPUT.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.model import ModelBenchmarkConfig, write_record


@command("benchmark_model", ModelBenchmarkConfig)
def main(config: ModelBenchmarkConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
