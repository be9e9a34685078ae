"""Does the main job in one command: make demo, or python scripts/demo.py [output=DIR] [key=value ...]

It films a story with a model that was trained before, which is seen in the first minute. Then it makes a storyworld,
prepares its films, trains a small model with Mixture of Contexts, samples a story from it, and checks what came out;
where there is a GPU, this world and model are larger (configs/demo.yaml). Every stage is a command of this project, as
a user would call it. It ends with status 1 where the new model's film does not show the scripted places, or the model
is no better than the best linear predictor.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from omegaconf import OmegaConf

from configs.command import command, parse
from data.loading.dataset import DataConfig
from evaluation.demo import DemoConfig, report, run_demo


@command("demo", DemoConfig)
def main(config: DemoConfig) -> None:
    if Path(config.output).exists():
        raise FileExistsError(f"output={config.output} exists; remove it (make clean) or choose another output=DIR")
    seconds = run_demo(config)
    data = parse(OmegaConf.load(Path(config.output) / "run/config.yaml").data, DataConfig)
    if not report(config, data, seconds):
        sys.exit(1)


if __name__ == "__main__":
    main()
