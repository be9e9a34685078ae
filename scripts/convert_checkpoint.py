"""Converts a checkpoint: python scripts/convert_checkpoint.py input=PATH [output=PATH] [key=value ...]

`input`: a diffusers folder or pipeline, a .safetensors file with original or ComfyUI names (Wan, HoloCine), a training
run or checkpoint (that of a LoRA is merged into its base), or the .pth of Wan's T5 encoder or of its VAE (2.1 or 2.2).
The command prints what it is; leave `output` out to look only.
`output`: a path that ends in .safetensors gets original names, any other becomes a diffusers folder, or with
`form=checkpoint` a run's folder, which `sample.py checkpoint=`, `scripts/evaluate.py checkpoint=` and `train.py
model.path=` take. Tensors pass one by one: 14B needs 1 GiB of memory. Two experts (Wan2.2-A14B, HoloCine) are
converted one by one: `input=FOLDER/transformer`, then `input=FOLDER/transformer_2`; or the file of each.
"""

import math
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

import torch

from configs.command import command
from moc.errors import UserError
from models.checkpoints.export import Beside, Form, convert
from models.checkpoints.opening import open_checkpoint
from models.checkpoints.pickles import convert_pickle
from models.checkpoints.tensors import PICKLES


class Weights(StrEnum):
    ema = "ema"
    model = "model"


class Dtype(StrEnum):
    """This setting says how converted weights are stored."""

    stored = "stored"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class ConvertConfig(Beside):
    """These settings say what to convert, and into what.

    input: the file or folder to convert.
    output: the file or folder to write; null only looks.
    form: the form of the output; auto is original for a path that ends in .safetensors, else diffusers.
    weights: those of a training checkpoint to take.
    dtype: that of the output; norms, modulation and the time embedder are fp32 in each but stored.
    max_shard_gb: the size of a folder's largest file.
    """

    input: str = field(kw_only=True)
    output: str | None = None
    form: Form = Form.auto
    weights: Weights = Weights.ema
    dtype: Dtype = Dtype.stored
    max_shard_gb: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.max_shard_gb < math.inf:
            raise UserError(f"max_shard_gb={self.max_shard_gb} must be above 0 and finite")


@command("convert", ConvertConfig)
def main(config: ConvertConfig) -> None:
    source, output = Path(config.input), Path(config.output) if config.output else None
    if source.suffix in PICKLES:
        if output is None:
            raise UserError("output is not set; say output=FOLDER, the folder to write")
        if config != ConvertConfig(input=config.input, output=config.output):
            raise UserError(f"{source} is a pickle, with which only input and output go; leave the other settings out")
        print(f"{source}: {convert_pickle(source, output)}")
    else:
        checkpoint = open_checkpoint(source, config.weights)
        checkpoint.empty_model()
        print(f"{source}: {checkpoint.describe()}")
        if output:
            dtype = None if config.dtype == Dtype.stored else getattr(torch, config.dtype)
            convert(checkpoint, output, dtype, int(config.max_shard_gb * 1000**3), config.form, config)
    if output:
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
