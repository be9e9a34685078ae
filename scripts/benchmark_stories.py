"""Measures what a trained recall model remembers over whole stories, and in ways it was not trained for.

python scripts/benchmark_stories.py [checkpoints=[PATH,...]] [ways=[joint,staggered,shot_by_shot]] [stories=N]
    [shots=[8,16,24]] [scenes=N] [moc.KEY=VALUE ...]

Each checkpoint makes stories of captions alone, which tell no looks: all shots at once, staggered, and shot by shot. A
row is one checkpoint, one number of shots and one way: how much more often two shots of one name agree than two of
different names (evaluation/recall/agreement.py). The way `recall` tests the last shot after a true history instead, as
benchmark_recall.py does, in `scenes` scenes; the way `mass` tells what share of dense attention's mass on other shots
the routes of `moc` keep (evaluation/recall/mass.py). `moc` changes the attention of all, untrained. These test the kept
model, and the dense one that docs/evidence.md brings back:

    ways=[joint,staggered,shot_by_shot,recall]              whole stories of 8 shots
    shots=[16,24] ways=[recall,shot_by_shot] stories=32     more shots than in training
    ways=[recall] checkpoints=[outputs/recall_dense] moc.dense=false moc.chunk_tokens=24 moc.descriptor_subchunks=4
                                                            a chunk of a frame, scored by log-sum-exp, untrained
    ways=[mass] scenes=64 and the same                      the mass that such routes keep
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from configs.ways import lags
from configs.world import world_of_experiment
from evaluation.benchmarks.stories import StoriesConfig, write_record


@command("benchmark_stories", StoriesConfig)
def main(config: StoriesConfig) -> None:
    write_record(config, lambda device: world_of_experiment(config.settings, device), lags())


if __name__ == "__main__":
    main()
