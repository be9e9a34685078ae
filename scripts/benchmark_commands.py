"""Times the commands of README.md and docs on a GPU, each in a fresh process as a user starts it:
python scripts/benchmark_commands.py [folder=DIR] [only=[NAME,...]]

A command may need what others make (see `plan`): these run first, unless they ran in that folder at this commit.
Commands that the record has at this commit are left out, so that a second call goes on where the first one ended. A
command's output goes to folder/logs/. Where one fails, those that need it are left out, and the exit status is 1.

There is no public checkpoint: Wan's are random weights of the 1.3B shape and of its VAE, with a text encoder of one
layer. Left out are scripts/app.py, which serves until it is ended, and whatever is for several hosts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.commands import CommandsConfig, write_record


@command("benchmark_commands", CommandsConfig)
def main(config: CommandsConfig) -> None:
    if not write_record(config):
        sys.exit(1)


if __name__ == "__main__":
    main()
