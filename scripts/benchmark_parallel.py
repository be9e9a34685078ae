"""Measures a training step on one and on several GPUs of a host, dense and MoC, along each axis of the mesh:
python scripts/benchmark_parallel.py [processes=2] [model=wan_1.3b] [shots=[1,2,4]] [meshes=[one,data,shard,sequence]]

A step is the trainer's own (noise, forward, backward, clipping, AdamW, moving average) on films of random latents, with
blocks recomputed in backward. `one` is one process; `data` and `shard` give each process a film of its own, `sequence`
all of them one film. Each row is written as soon as it is measured, and the same command goes on where it was stopped;
where a film does not fit, that is a row, and longer ones are left out. Stages that take seconds are printed as well.

`tokens a step` are those of all films, and `of one` is their number a second beside that of one process. `peak` is the
largest of the processes. `exchange` is the share of a step that the device spends in the exchanges around attention,
and `collectives` that in all of them, waiting for others included; steps of 20 s or more are not profiled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.parallel import BenchmarkConfig, write_record


@command("benchmark_parallel", BenchmarkConfig)
def main(config: BenchmarkConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
