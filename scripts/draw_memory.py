"""Draws the README's moving picture: a film beside the earlier shots that one of the model's heads looks back to.

python scripts/draw_memory.py checkpoint=PATH script=FILE out=DIR [output=FILE.webp] [settings of sample.py]

It films the script anew, and shows the head whose routes lead most to single shots.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from configs.schema import SampleConfig
from evaluation.films.looking_back import Watched, write_picture
from film.folder import FilmFolder
from moc.errors import UserError


@dataclass
class DrawMemoryConfig(SampleConfig):
    """These settings say what to film and where to draw it.

    output: the WebP to write.
    """

    output: str = "docs/memory.webp"


@command("draw_memory", DrawMemoryConfig)
def main(config: DrawMemoryConfig) -> None:
    filmmaker, folder = Watched(config), FilmFolder(Path(config.out))
    if folder.path.exists():
        raise UserError(f"out={config.out} exists; the film is made anew, so name another folder")
    script = filmmaker.read(Path(config.script), config.size, config.fps)
    if len(script.shots) < 3:
        raise UserError(f"{config.script} has {len(script.shots)} shots; give three, of which the last can choose")
    write_picture(filmmaker, script, folder, Path(config.output))


if __name__ == "__main__":
    main()
