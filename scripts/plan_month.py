"""Plans a long run on paper: python scripts/plan_month.py [gpus=64] [model=wan_14b] [shots=8] [meshes=[[8,8],[4,16]]]

It measures nothing: by count, and by the rows that `benchmark_parallel.py` measured on one and two GPUs, it tells for
each mesh what a GPU holds, how long a step and a month's run take, and what its checkpoints move. The table says in
words what is assumed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from evaluation.benchmarks.month import PlanConfig, write_plan


@command("plan_month", PlanConfig)
def main(config: PlanConfig) -> None:
    write_plan(config)


if __name__ == "__main__":
    main()
