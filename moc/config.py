"""`MoCConfig` says what is attended to, in one frozen, validated, JSON-ready object; `moc.execution` says how.

Source: Mixture of Contexts for Long Video Generation, arXiv 2508.21058, section 3 (anchors, causal routing, drops).
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from moc.earlier import MOC
from moc.errors import UserError, check_least, set_types


class OwnAnchor(StrEnum):
    """This setting says which of its own tokens a query always attends to."""

    shot = "shot"
    chunk = "chunk"
    none = "none"


class TextAnchor(StrEnum):
    """This setting says which text tokens a query always attends to."""

    all = "all"
    global_and_own = "global_and_own"
    none = "none"


class Candidates(StrEnum):
    """This setting says which video chunks routing may choose from: all, or the first of each shot alone."""

    all = "all"
    first = "first"


class Descriptor(StrEnum):
    """This setting says which tensors routing scores: q and k as attention uses them, or those passed as `route_qk`."""

    post_rope = "post_rope"
    pre_rope = "pre_rope"


@dataclass(frozen=True)
class MoCConfig:
    """These settings say what `moc.moc_attention` attends to; strings are accepted for the enums.

    dense: plain attention within each sample, no routing; the other fields are then unused.
    chunk_tokens: target chunk size in tokens, for whoever builds or rechunks the layout; attention takes the layout's.
    top_k: chunks chosen for each query and head besides the anchors.
    causal: routed information flows forward only (paper: "causal routing"): to chunks of earlier shots, or to earlier
        chunks of the stream where the own shot is no anchor.
    own_anchor, text_anchor: what a query attends to whatever its routes: its own `shot`, `chunk` or `none`; the text of
        `all` shots, `global_and_own` or `none`. A query of global text, which stands in no shot, has text anchors only.
    candidates: which video chunks routing may choose from: `all`, or the `first` of each shot, such as its first frame.
    descriptor: what routing scores: q and k as attention uses them (`post_rope`) or those of `route_qk` (`pre_rope`).
    descriptor_subchunks: into how many runs of tokens a chunk is cut, each with a mean of its own (1: the paper's). A
        chunk scores log(sum of n_j / n exp(q . mean_j / sqrt(D))), where sub-chunk j has n_j of its n tokens: with more
        of them that is nearer to the softmax mass it would have.
    drop_off_max: p_max of context drop-off (training only); a query loses floor(p k) of k routes, p ~ U(0, p_max).
    drop_in_rate, drop_in_max: lambda of context drop-in (training only), and its bound; a query gains
        min(Poisson(lambda), drop_in_max) chunks.
    dense_layers: how many of the model's first layers attend densely.

    Neither p_max nor lambda is published. Our values drop (p_max=1) or add half a chunk or more a query on average.
    """

    dense: bool = False
    chunk_tokens: int = 1280
    top_k: int = 5
    causal: bool = True
    own_anchor: OwnAnchor = OwnAnchor.shot
    text_anchor: TextAnchor = TextAnchor.all
    candidates: Candidates = Candidates.all
    descriptor: Descriptor = Descriptor.post_rope
    descriptor_subchunks: int = 1
    drop_off_max: float = 1.0
    drop_in_rate: float = 0.5
    drop_in_max: int = 2
    dense_layers: int = 0

    def __post_init__(self) -> None:
        set_types(self, "MoCConfig")
        check_least(self, "MoCConfig", 1, "chunk_tokens", "descriptor_subchunks")
        check_least(self, "MoCConfig", 0, "top_k", "drop_in_max", "drop_in_rate", "dense_layers")
        if not 0 <= self.drop_off_max <= 1:
            raise UserError(f"MoCConfig.drop_off_max={self.drop_off_max} must lie in [0, 1]")

    @property
    def has_drops(self) -> bool:
        return self.drop_off_max > 0 or (self.drop_in_rate > 0 and self.drop_in_max > 0)

    @property
    def flows_forward(self) -> bool:
        """Returns whether a token depends on its own and earlier shots only."""
        return self.text_flows_forward and not self.dense and not self.dense_layers

    @property
    def text_flows_forward(self) -> bool:
        """Returns whether a shot's text must not depend on later shots. Dense steps and layers do not change that."""
        return self.causal and self.own_anchor is OwnAnchor.shot and self.text_anchor is TextAnchor.global_and_own

    def at_layer(self, layer: int) -> "MoCConfig":
        """Returns the settings of one layer: this, or dense for the first `dense_layers`."""
        return replace(self, dense=True) if layer < self.dense_layers else self

    def to_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, StrEnum) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoCConfig":
        """Returns the inverse of `to_dict`; settings left out have their defaults. Raises UserError for what does not
        fit."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"unknown MoC settings {sorted(unknown)}; known are {[f.name for f in fields(cls)]}")
        return cls(**values)

    @classmethod
    def unset(cls) -> dict[str, Any]:
        """Returns every setting as None, which `override` leaves as it is."""
        return dict.fromkeys(field.name for field in fields(cls))

    def override(self, values: dict[str, Any]) -> "MoCConfig":
        """Returns these settings with those of `values` that are not None. Raises UserError for what does not fit."""
        return self.from_dict(self.to_dict() | {name: value for name, value in values.items() if value is not None})

    def save(self, folder: str | Path) -> None:
        """Writes the settings as `moc.json` beside a model's weights."""
        Path(folder, "moc.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "MoCConfig":
        """Returns what `save` wrote, without what only earlier versions wrote; raises UserError, naming the file, where
        it does not fit."""
        file = Path(folder, "moc.json")
        try:
            values = json.loads(file.read_text())
            if not isinstance(values, dict):
                raise UserError(f"it must hold one JSON object, not {str(values)[:20]!r}")
            return cls.from_dict(MOC.translated(values))
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None


@dataclass(frozen=True)
class DropKey:
    """A drop key sets the random draws of context drop-off and drop-in, together with what the layout says of each
    token: its sample's position in the run and its offset in the sample. The same key gives a sample the same draws on
    any device or rank, in any pack, head split or recomputation. `first_head` is the global index of head 0 of the
    tensors at hand. step: a number, or an int64 tensor [] of it on the device, for a CUDA graph that is replayed at
    other steps."""

    seed: int
    step: int | Tensor
    layer: int = 0
    first_head: int = 0
