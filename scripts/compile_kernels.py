"""Compiles every Triton kernel for every generation of GPUs, without a GPU, and writes what each takes.

    python scripts/compile_kernels.py              # all of them, minutes; writes docs/benchmarks/kernels_ahead.md
    python scripts/compile_kernels.py gpus=[90] kinds=[bf16-64] output=kernels.json

It ends with exit status 1 where a kernel takes more shared memory than a program may have, or spills more registers
than moc/kernels/compilation.py allows.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

    os.environ["TRITON_INTERPRET"] = "0"  # the interpreter compiles nothing

from configs.command import command
from evaluation.benchmarks.kernels_ahead import CompileConfig, write_record


@command("compile_kernels", CompileConfig)
def main(config: CompileConfig) -> None:
    write_record(config)


if __name__ == "__main__":
    main()
