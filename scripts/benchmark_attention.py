"""Measures MoC attention against dense attention on one GPU, side by side in one run.

python scripts/benchmark_attention.py [suites=[shots,chunks,heads,single,million,short]] [impls=[fa2,cudnn,fa3,fa4]]
    [output=docs/benchmarks/attention]

Writes OUTPUT.json (a header and rows; a row of the same case is replaced), OUTPUT.md (tables) and OUTPUT.png (latency
against shots, the paper's figure 5).

MoC rows carry routing and index in their forward time. Times are medians, in ms; peaks are of all memory allocated,
inputs and gradients included. A short stream takes longer to launch than to compute: `graph` rows replay a CUDA graph
of its forward and backward, `compiled` rows call both through torch.compile(mode="reduce-overhead"). `short` packs many
scenes of short shots; their dense rival is one variable-length FlashAttention-2 call over whole scenes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.attention import AttentionBenchmarkConfig, write_record


@command("benchmark_attention", AttentionBenchmarkConfig)
def main(config: AttentionBenchmarkConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
