"""This module converts checkpoints between their forms, with one tensor in memory at a time.

It writes a diffusers folder, one file with Wan's original names, or a run's folder with one training checkpoint.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moc import MoCConfig
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training.checkpoint import new_checkpoint, write_state
from models.checkpoints.contents import Contents
from models.checkpoints.names import to_original_name
from models.checkpoints.opening import Checkpoint
from models.checkpoints.seen import Seen
from models.checkpoints.tensors import Entry, new_folder, write_sharded, write_tensors
from models.encoders.codec import CodecKind
from models.encoders.pair import EncodersConfig, find_encoders, read_encoders, write_encoders
from models.encoders.text import TextKind


class Form(StrEnum):
    """This setting names the form to write. auto: original for a path that ends in .safetensors, else diffusers."""

    auto = "auto"
    diffusers = "diffusers"
    original = "original"
    checkpoint = "checkpoint"


@dataclass(frozen=True)
class Beside:
    """These are the settings beside the weights; null takes the input's, where it has them. All but moc are for a
    training checkpoint.

    moc: the settings of attention, moc.json.
    shift: the shift of the flow.
    encoders_path: what `models.encoders.pair.read_encoders` reads; embedded encoders are copied, others noted by path.
    encoders: the settings of the encoders themselves, in place of encoders_path; they say what a path cannot: how
    HoloCine's weights were trained.
    """

    moc: dict[str, Any] = field(default_factory=MoCConfig.unset)
    shift: float | None = None
    encoders_path: str | None = None
    encoders: EncodersConfig | None = None

    def __post_init__(self) -> None:
        if self.encoders_path and self.encoders:
            raise UserError(f"encoders_path={self.encoders_path} and encoders exclude each other; leave one out")

    def given(self) -> list[str]:
        """Returns the names of those that do not come from the input."""
        values = {field.name: getattr(self, field.name) for field in fields(Beside)}
        values["moc"] = next((value for value in self.moc.values() if value is not None), None)
        return [name for name, value in values.items() if value is not None]

    def check(self, form: Form) -> None:
        """Raises UserError where a form has no place for something given."""
        kept = {Form.original: (), Form.diffusers: ("moc",), Form.checkpoint: tuple(self.given())}[form]
        lost = [name for name in self.given() if name not in kept]
        if lost:
            raise UserError(f"form={form} has no place for {', '.join(lost)}; use form=checkpoint")


def convert(
    checkpoint: Checkpoint,
    output: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 10 * 1000**3,
    form: Form = Form.auto,
    beside: Beside | None = None,
) -> None:
    """Writes `output` from a checkpoint; nothing appears there before it is whole. dtype: of its weights (norms,
    modulation and the time embedder are then fp32), None as stored.

    The training-checkpoint form is a run's folder with a checkpoint at step 0, to sample, evaluate and fine-tune from
    like one of ours. It has no optimizer: there is nothing to resume.
    Raises UserError where the form cannot hold the model or what is to stand beside it, or `output` exists.
    """
    beside = beside or Beside()
    is_file = output.suffix == ".safetensors"
    if form is Form.auto:
        form = Form.original if is_file else Form.diffusers
    if is_file != (form is Form.original):
        raise UserError(f"output={output} does not fit form={form}: original is a .safetensors file, others a folder")
    if output.exists():
        raise UserError(f"{output} exists; name a new path")
    beside.check(form)
    moc, flow, encoders = _moc(checkpoint, beside), _flow(checkpoint, beside), _encoders(checkpoint, beside)
    seen = Seen.read(Contents(checkpoint.path))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(desc="convert", total=len(checkpoint.stored), unit="tensor", disable=not sys.stderr.isatty()) as bar:

        def read(name: str) -> Tensor:
            bar.update()
            return checkpoint.read(name)

        if form is Form.original:
            _write_original(checkpoint, read, output, dtype)
            return
        with new_folder(output) as partial:
            if form is Form.diffusers:
                _write_diffusers(checkpoint, read, partial, dtype, shard_bytes, moc)
                return
            with new_checkpoint(partial, step=0) as folder:
                _write_diffusers(checkpoint, read, folder / "model", dtype, shard_bytes, moc or MoCConfig())
                write_state(folder, {"step": 0, "flow": asdict(flow)})
                if seen != Seen():
                    seen.write(folder)
                if encoders is not None:
                    write_encoders(encoders, folder / "encoders")


def _entries(checkpoint: Checkpoint, dtype: torch.dtype | None) -> list[Entry]:
    shapes = checkpoint.source.shapes
    dtypes = checkpoint.dtypes(checkpoint.empty_model(), dtype)
    return [(name, held, shapes[checkpoint.stored[name]]) for name, held in dtypes.items()]


def _write_original(
    checkpoint: Checkpoint, read: Callable[[str], Tensor], file: Path, dtype: torch.dtype | None
) -> None:
    if checkpoint.kind == "MMDiT":
        raise UserError(f"{file}: only Wan models have a form with original names; name a folder for an MMDiT")
    ours = {to_original_name(name) or name: name for name in checkpoint.stored}
    entries = [(to_original_name(name) or name, held, shape) for name, held, shape in _entries(checkpoint, dtype)]
    write_tensors(file, entries, lambda name: read(ours[name]))


def _write_diffusers(
    checkpoint: Checkpoint,
    read: Callable[[str], Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    moc: MoCConfig | None,
) -> None:
    checkpoint.empty_model().save_config(folder)
    write_sharded(folder, _entries(checkpoint, dtype), read, shard_bytes=shard_bytes)
    if moc is not None:
        moc.save(folder)


# Beside the weights


def _moc(checkpoint: Checkpoint, beside: Beside) -> MoCConfig | None:
    """Returns the input's attention settings with the given ones; None where there are neither."""
    if "moc" not in beside.given():
        return checkpoint.moc
    return (checkpoint.moc or MoCConfig()).override(beside.moc)


def _flow(checkpoint: Checkpoint, beside: Beside) -> Flow:
    """Returns the input's noise convention, with the given shift. An expert that leaves its pipeline keeps the range of
    noise levels that the pipeline gave it."""
    flow = Contents(checkpoint.path).own_flow
    return flow if beside.shift is None else replace(flow, shift=beside.shift)


def _encoders(checkpoint: Checkpoint, beside: Beside) -> EncodersConfig | None:
    """Returns the given encoders, or the input's, if it has any."""
    if beside.encoders is not None:
        return _lasting(beside.encoders)
    return read_encoders(beside.encoders_path) if beside.encoders_path else find_encoders(checkpoint.root)


def _lasting(config: EncodersConfig) -> EncodersConfig:
    """Returns settings with paths that hold in any folder; raises UserError where a codec or text encoder has none."""
    paths = []
    for name, wanted, encoder in (("codec", CodecKind.wan, config.codec), ("text", TextKind.t5, config.text)):
        if encoder.kind is not wanted or encoder.path is None or not Path(encoder.path).is_dir():
            path = "null" if encoder.path is None else repr(encoder.path)
            raise UserError(
                f"encoders.{name}.kind={encoder.kind}, encoders.{name}.path={path} must be {wanted} and a folder; "
                "encoders_path=FOLDER takes those of another kind from where they were made"
            )
        paths.append(str(Path(encoder.path).resolve()))
    codec, text = paths
    return EncodersConfig(replace(config.codec, path=codec), replace(config.text, path=text))
