"""What a Mixture-of-Contexts attention does: one frozen, validated, JSON-ready object.

Source: Mixture of Contexts for Long Video Generation, arXiv 2508.21058, section 3 (anchors, causal routing, drops).
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from moc.errors import UserError, check_least


class OwnAnchor(StrEnum):
    """Which of its own tokens a query always attends to."""

    shot = "shot"
    chunk = "chunk"
    none = "none"


class TextAnchor(StrEnum):
    """Which text tokens a query always attends to."""

    all = "all"
    global_and_own = "global_and_own"
    none = "none"


class Candidates(StrEnum):
    """Which video chunks routing may choose from: all, or the first of each shot alone."""

    all = "all"
    first = "first"


class Descriptor(StrEnum):
    """Which tensors routing scores: q and k as attention uses them, or those passed as `route_qk`."""

    post_rope = "post_rope"
    pre_rope = "pre_rope"


class Backend(StrEnum):
    """Who computes the attention; `auto` takes the fastest that fits the device."""

    auto = "auto"
    reference = "reference"
    torch = "torch"
    triton = "triton"


HOW_COMPUTED = ("backend", "dense_kernel", "deterministic")  # settings that leave what is attended to as it is


@dataclass(frozen=True)
class MoCConfig:
    """Settings of `moc.moc_attention`; strings are accepted for the enums.

    dense: plain attention within each sample, no routing; the other fields are then unused.
    chunk_tokens: target chunk size in tokens, for whoever builds or rechunks the layout; attention takes the layout's.
    top_k: chunks chosen for each query and head besides the anchors.
    causal: routed information flows forward only (paper: "causal routing"): to chunks of earlier shots, or to earlier
        chunks of the stream where the own shot is no anchor.
    own_anchor, text_anchor: what a query attends to whatever its routes: its own `shot`, `chunk` or `none`; the text of
        `all` shots, `global_and_own` or `none`. A query of global text, which stands in no shot, has text anchors only.
    candidates: which video chunks routing may choose from: `all`, or the `first` of each shot, such as its first frame.
    descriptor: what routing scores: q and k as attention uses them (`post_rope`) or those of `route_qk` (`pre_rope`).
    drop_off_max: p_max of context drop-off (training only); a query loses floor(p k) of k routes, p ~ U(0, p_max).
    drop_in_rate, drop_in_max: lambda of context drop-in (training only), and its bound; a query gains
        min(Poisson(lambda), drop_in_max) chunks.
    backend: who computes it; `auto` takes the fastest that fits.
    dense_kernel: name of the dense kernel for anchored parts ("auto" takes the fastest present).
    deterministic: bitwise repeatable gradients, at some cost in speed.
    dense_layers: how many of the model's first layers attend densely.
    cut_gap: latent frames left out of the running time at each true cut, by models whose time runs on over shots (wan).

    Neither p_max nor lambda is published. Ours drop (p_max=1) or add half a chunk or more a query on average.
    """

    dense: bool = False
    chunk_tokens: int = 1280
    top_k: int = 5
    causal: bool = True
    own_anchor: OwnAnchor = OwnAnchor.shot
    text_anchor: TextAnchor = TextAnchor.all
    candidates: Candidates = Candidates.all
    descriptor: Descriptor = Descriptor.post_rope
    drop_off_max: float = 1.0
    drop_in_rate: float = 0.5
    drop_in_max: int = 2
    backend: Backend = Backend.auto
    dense_kernel: str = "auto"
    deterministic: bool = False
    dense_layers: int = 0
    cut_gap: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            kind: Any = field.type
            object.__setattr__(self, field.name, _typed(field.name, kind, getattr(self, field.name)))
        lowest = {"chunk_tokens": 1, "top_k": 0, "drop_in_max": 0, "drop_in_rate": 0, "dense_layers": 0, "cut_gap": 0}
        for name, low in lowest.items():
            check_least(self, "MoCConfig", low, name)
        if not 0 <= self.drop_off_max <= 1:
            raise UserError(f"MoCConfig.drop_off_max={self.drop_off_max} must lie in [0, 1]")

    @property
    def has_drops(self) -> bool:
        return self.drop_off_max > 0 or (self.drop_in_rate > 0 and self.drop_in_max > 0)

    @property
    def flows_forward(self) -> bool:
        """Whether a token depends on its own and earlier shots only."""
        return self.text_flows_forward and not self.dense and not self.dense_layers

    @property
    def text_flows_forward(self) -> bool:
        """Whether a shot's text must not depend on later shots. Dense steps and layers do not change that."""
        return self.causal and self.own_anchor is OwnAnchor.shot and self.text_anchor is TextAnchor.global_and_own

    def at_layer(self, layer: int) -> "MoCConfig":
        """The settings of one layer: this, or dense for the first `dense_layers`."""
        return replace(self, dense=True) if layer < self.dense_layers else self

    def to_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, StrEnum) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoCConfig":
        """The inverse of `to_dict`; settings left out have their defaults. Raises UserError for what does not fit."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"unknown MoC settings {sorted(unknown)}; known are {[f.name for f in fields(cls)]}")
        return cls(**values)

    @classmethod
    def unset(cls) -> dict[str, Any]:
        """Every setting as None, which `override` leaves as it is."""
        return dict.fromkeys(field.name for field in fields(cls))

    def override(self, values: dict[str, Any]) -> "MoCConfig":
        """These settings with those of `values` that are not None. Raises UserError for what does not fit."""
        return self.from_dict(self.to_dict() | {name: value for name, value in values.items() if value is not None})

    def save(self, folder: str | Path) -> None:
        """Writes what is attended to as `moc.json` beside a model's weights. How it is computed belongs to whoever
        computes: another machine may lack the kernel."""
        semantics = {name: value for name, value in self.to_dict().items() if name not in HOW_COMPUTED}
        Path(folder, "moc.json").write_text(json.dumps(semantics, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "MoCConfig":
        """What `save` wrote; raises UserError, naming the file, where it does not fit. Files of earlier versions also
        say how attention was computed, which is left out."""
        file = Path(folder, "moc.json")
        try:
            values = json.loads(file.read_text())
            if not isinstance(values, dict):
                raise UserError(f"it must hold one JSON object, not {str(values)[:20]!r}")
            return cls.from_dict({name: value for name, value in values.items() if name not in HOW_COMPUTED})
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def _typed(name: str, kind: type, value: Any) -> Any:
    """A setting's value as its field's type; raises UserError for one of another type. Nothing is converted but names
    to enums: "5" is no number, and neither is true."""
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise UserError(f"MoCConfig.{name}={value!r} is not one of {', '.join(kind)}")
        return kind(value)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"MoCConfig.{name}={value!r} must be {_NAMES[kind]}")
    return value


@dataclass(frozen=True)
class DropKey:
    """Names the random draws of context drop-off and drop-in, together with what the layout says of each token: its
    sample's position in the run and its place in the sample. The same key gives a sample the same draws on any device
    or rank, in any pack, head split or recomputation. `first_head` is the global index of head 0 of the tensors at
    hand. step: a number, or an int64 tensor [] of it on the device, for a CUDA graph that is replayed at other steps.
    """

    seed: int
    step: int | Tensor
    layer: int = 0
    first_head: int = 0
