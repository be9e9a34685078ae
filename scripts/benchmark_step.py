"""Measures where the time of a whole training step goes on one GPU, and how near it comes to its floor.

python scripts/benchmark_step.py [model=base] [tokens=65536] [packs=[[3,4,6],[6,8,12]]] [output=FILE]

A step is the trainer's own: noise, forward and backward under autocast, clipping, AdamW and the moving average, on
packs of scenes of four shots of random latents, as the loader sends them; `packs` are the token grids of a shot. The
number of scenes changes from step to step, as in training. The floor of a step is what no code could avoid:

- the FLOPs of its matmuls and of its attended pairs, forward and backward, at the rate of one large bf16 matmul
- the bytes that its pointwise operations, the optimizer and the casts of weights must move, at the speed of a copy

`host` is the time that the host takes to launch a step, `busy` that of the kernels on the GPU, which are told by kind.
Phases are timed on the GPU: where the host is behind, they hold the GPU's waiting. `data` is what comes before forward:
the batch, its tables and its noise levels. What is measured is printed at once, with the functions that take the host
longest, and a row is written when its pack is done; a row of the same model, tokens, pack and kernel is replaced.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.step import StepConfig, write_record


@command("benchmark_step", StepConfig)
def main(config: StepConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
