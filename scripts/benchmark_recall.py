"""Measures what models remember that are trained alike under different kinds of attention, one row for each.

python scripts/benchmark_recall.py rows=[dense,own_shot] [steps=N] [minutes=N] [at_once=N] [start=PATH]
    [settings=["key=value",...]]

Each row is `python train.py experiment=recall` with its own settings, all rows at once on one device, or `at_once` of
them and the others in their turn; a row that is not finished after `minutes` is tested where it stands, and the same
command goes on with it. With `start` all rows begin with the weights of one checkpoint, such as a dense row's, instead
of none. Tests are those of evaluation/recall/bench.py. A row is put into the output as soon as it is tested, with its
command; a row of the same name, seed, steps and start is replaced. `folder/RUN.tar.gz` holds its averaged weights in
bf16.

The dense weights that rows of docs/benchmarks/recall.md began with are kept in this repository's past:

    mkdir -p outputs
    git archive a853701 docs/checkpoints/recall_dense | tar x -C outputs --strip-components=2

Ablations are short: six rows of 800 steps side by side, with their tests, take four minutes of one H100, which takes
some 40 such steps a second in all, however many rows share it. Each is `python scripts/benchmark_recall.py` with one of
these lines:

    ON='start=outputs/recall_dense settings=["optim.lr=1e-3"] steps=800 scenes=1280 look_alikes=0 swaps=false'
    rows=[dense,moc,moc_no_drops,moc_no_own_shot,moc_of_frames,moc_not_causal] $ON
    rows=[moc_dense_target,moc_no_text,moc_no_drops_all_text,moc_progressive,moc_of_half_frames,dense_causal] $ON
    rows=[moc_pre_rope,moc_lse,moc_lse_of_frames,first_frame,random,own_shot] $ON
    rows=[dense,moc,moc_dense_target,first_frame,random,own_shot] seed=1 $ON          other seeds of the main rows
    rows=[moc_pre_rope,moc_lse,moc_lse_not_causal_of_four] $ON         log-sum-exp of three means, and before RoPE
    rows=[moc] steps=16000 course=2000      from scratch, as dense was; its routes over training; goes on if asked again
    rows=[moc] shots=[16,24] $ON                                   more shots than in training, tested only
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from configs.world import world_of_experiment
from evaluation.benchmarks.recall import RecallRowsConfig, write_record


@command("benchmark_recall", RecallRowsConfig)
def main(config: RecallRowsConfig) -> None:
    write_record(config, lambda device: world_of_experiment(config.settings, device))


if __name__ == "__main__":
    main()
