"""Draws what models make of a shot whose looks an earlier shot showed, beside the truth: a row for each scene.

python scripts/draw_recall.py models=[PATH,...] output=FILE.jpg [scenes=N] [steps=N]

The scenes are the first of those of experiment=recall that no training sees (evaluation/recall/bench.py). Their history
is given true and clean, and the shot that shows the name is framed. The last model is also sampled without routes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from configs.world import world_of
from data.storyworld.recall_scenes import RecallConfig
from evaluation.recall.sheet import DrawRecallConfig, write_sheet
from models import Contents


@command("draw_recall", DrawRecallConfig)
def main(config: DrawRecallConfig) -> None:
    recall = RecallConfig()
    write_sheet(config, lambda device: world_of(Contents(Path(config.models[-1])), recall, device))


if __name__ == "__main__":
    main()
