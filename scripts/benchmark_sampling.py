"""Measures how long a film takes on one GPU and how much memory, dense against MoC, in each way of sampling.

python scripts/benchmark_sampling.py [films=[paper]] [impls=[moc,dense]] [modes=[staggered,joint,...]] [timed=3]

The sampler is the films' own, on the shape of Wan2.1-T2V-1.3B with random weights in bf16 and with guidance. `paper`
is a minute of 8 x 23,040 tokens, `wan` one of 480x832 at 16 fps, 375,960 tokens in eight shots, `wan_12` the same in
twelve, of at most 81 frames as Wan was trained on. A whole film is extrapolated: `timed` steps are taken of each stream
(the shots that a step sees), the first of which may have to remember a shot. Streams that are computed whole cost the
same in every mode, so that one measurement of them serves all modes of a call. `decode` is a random AutoencoderKLWan on
one shot. Each row is written as soon as it is measured and replaces one of the same settings.

One H100 is expected to take (by count, from docs/benchmarks/model.md; start and compilation, about a minute, included):

    films=[paper] impls=[moc]                                                 4 minutes, 60 GB of the host's memory
    films=[paper] impls=[moc] modes=[extend,extend_offload] sampler.context_shots=4    3 minutes, 45 GB there
    films=[paper] impls=[dense] timed=2                                       4 minutes
    films=[wan] impls=[moc] modes=[staggered,joint,extend_uncached,decode]    4 minutes
    films=[wan] impls=[moc] modes=[extend_offload] sampler.context_shots=4    3 minutes, 86 GB of the host's memory
    films=[wan] impls=[dense] timed=1                                         7 minutes, 2.5 of modes=[joint] alone
    films=[wan_12] impls=[moc,dense] modes=[joint] timed=1                    4 minutes
    films=[paper] impls=[moc] modes=[joint] weights=fp8 [fp8_matmuls=true]    1 minute each
    model=wan_14b films=[wan_81] impls=[moc] modes=[extend_uncached,decode] timed=2 swap_blocks=36
        [weights=fp8]    3 minutes, 60 GB of the host's memory; modes=[extend_offload] needs 110 GB more

With swap_blocks the weights are drawn one by one, and the GPU never holds them all: a 14 B expert films in less than
24 GB.
The keys and values of the `wan` minute take 69 GB a side of guidance, so that `extend` without a smaller
sampler.context_shots does not fit a GPU of 80 GB. Several GPUs: torchrun with parallel.sequence=N.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from configs.ways import lags
from evaluation.benchmarks.sampling import SamplingBenchmarkConfig, write_record


@command("benchmark_sampling", SamplingBenchmarkConfig)
def main(config: SamplingBenchmarkConfig) -> None:
    write_record(config, lags())


if __name__ == "__main__":
    main()
