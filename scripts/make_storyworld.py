"""Makes a storyworld, videos with exact ground truth: python scripts/make_storyworld.py output=DIR [key=value ...]

`output` becomes a folder with videos/, manifest.jsonl (what prepare_data.py reads), truth.jsonl (what is in every
frame) and vocabulary.txt (every word of the captions). --help lists the settings and their defaults.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from data.storyworld import StoryworldConfig, generate
from moc.counts import count_of


def main(config: StoryworldConfig) -> None:
    manifest = generate(config)
    print(f"{count_of(config.scenes, 'scene')} in {manifest}")


if __name__ == "__main__":
    # This import is not above: every worker process imports this file, and it brings in transformers and diffusers.
    from configs.command import command

    command("storyworld", StoryworldConfig)(main)()
