"""Evaluates a checkpoint, sampled films, or both: python scripts/evaluate.py [checkpoint=PATH data.path=PREPARED]
[films=[FILM, OTHER]] [clip=FOLDER] [dino=FOLDER] [output=FILE.json] [page=FILE.html] [key=value ...]

It measures a checkpoint's held-out loss under dense, MoC and own-shot-only attention, at the same noise. MoC has no
parameters, so a dense checkpoint runs with it untrained (zero-shot) and the other way round. With equal noise on all
shots the rows barely differ; a clean history before one noisy shot tells what the history is worth. `accelerate launch`
deals the scenes to its processes. With recall={} the scenes are those of experiment=recall, composed without a disk.

In films that sample.py wrote it measures cuts, motion, drift, whether looks stay within a shot and come back with their
names, and with local weights text alignment. VBench runs in an environment of its own: its command is
printed, and vbench=[RESULT, ...], one for each film, puts its numbers beside the paper's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from configs.world import world_of
from evaluation.evaluate import EvaluateConfig, evaluate


@command("evaluate", EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    evaluate(config, world_of)


if __name__ == "__main__":
    main()
