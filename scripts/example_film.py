"""Fetches a whole real film, Big Buck Bunny (58 MB, CC-BY 3.0): python scripts/example_film.py output=DIR

docs/data.md has the commands that prepare it and train on it (experiment=bunny).

A manifest beside the film holds its shots, captions and scenes, made by eye (data/media/big_buck_bunny.json).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from data.media.example_film import CREDIT, ExampleFilmConfig, fetch


@command("example_film", ExampleFilmConfig)
def main(config: ExampleFilmConfig) -> None:
    print(f"{fetch(Path(config.output), config.scenes)}\n{CREDIT}")


if __name__ == "__main__":
    main()
