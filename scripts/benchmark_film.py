"""Measures on a real film what earlier shots are worth to a shot, by when its characters were last seen, row by row.

python scripts/benchmark_film.py film=BUNNY [rows=[dense,moc,own_shot]] [folds=[0,1,2,3]] [steps=N] [minutes=N] [seed=N]

Each row is `python train.py experiment=bunny` with its own settings, trained once for each fold, in which every fourth
block of ten shots is held out; all trainings run at once on one device. A training that is not finished after `minutes`
is tested where it stands, and the same command goes on with it. Tests are those of evaluation/history_worth.py over the
held-out shots. `film` is the folder that prepare_data.py made of the film (configs/experiment/bunny.yaml has the
commands). A row of the same name, fold, seed and steps is replaced in the output.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.film import FilmRowsConfig, write_record


@command("benchmark_film", FilmRowsConfig)
def main(config: FilmRowsConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
