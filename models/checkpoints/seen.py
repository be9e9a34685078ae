"""What a checkpoint was trained on is kept beside its weights in films.json: sampling takes its size and frame rate
from there, and whether to guide, and tells of what the model never saw."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moc import MoCConfig
from moc.errors import UserError
from moc.training.checkpoint import read_json, remedy
from models.checkpoints.contents import Contents

FILE = "films.json"
MOST_WORDS = 8  # so many unknown words are named


@dataclass(frozen=True)
class Seen:
    """These are the sizes (height, width) and frame rates of the films that a model was trained on, the most usual
    first, how many shots a sample had at most, and the share of samples that lost their captions in the latest training
    that dropped any; nothing where that is not known."""

    sizes: Sequence[Sequence[int]] = ()
    fps: Sequence[float] = ()
    max_shots: int = 0
    drop_captions: float | None = None

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, contents: Contents) -> "Seen":
        """Returns what `write` left in a checkpoint. Raises UserError where that is damaged."""
        file = contents.root / FILE
        try:
            return cls(**read_json(file)) if file.is_file() else cls()
        except TypeError:
            raise UserError(f"{file} does not say what the model was trained on; {remedy(file)}") from None

    @property
    def defaults(self) -> dict[str, object]:
        """Returns the size and the frame rate to film in, as a script has them."""
        found = {"size": list(next(iter(self.sizes), ())), "fps": next(iter(self.fps), None)}
        return {name: value for name, value in found.items() if value}

    def unseen(
        self, size: Sequence[int], fps: float, num_shots: int, is_guided: bool, words: Sequence[str] = ()
    ) -> list[str]:
        """Returns what of a film the model was never trained on, in words. is_guided: whether guidance asks it for a
        film without captions. words: those of its captions that its text encoder does not know."""
        told = []
        if self.sizes and list(size) not in [list(known) for known in self.sizes]:
            told.append(f"{size[0]}x{size[1]} (but {', '.join(f'{h}x{w}' for h, w in self.sizes)})")
        if self.fps and fps not in self.fps:
            told.append(f"{fps:g} frames a second (but {', '.join(f'{known:g}' for known in self.fps)})")
        if self.max_shots and num_shots > self.max_shots:
            told.append(f"{num_shots} shots (but {self.max_shots} at most)")
        if is_guided and self.drop_captions == 0:
            told.append("dropped captions, which guidance needs (sampler.guidance_scale=1 films without it)")
        if words:
            more = f" and {len(words) - MOST_WORDS} more" if len(words) > MOST_WORDS else ""
            told.append(f"the words {', '.join(map(repr, words[:MOST_WORDS]))}{more}")
        return told


def share_without_captions(rate: float, source: Path | str | None) -> float | None:
    """Returns `Seen.drop_captions` of a training that drops captions at a rate, and that began from the checkpoint or
    model `source`, or from fresh weights (None)."""
    if rate or source is None:
        return rate
    return Seen.read(Contents.at(source)).drop_captions


def is_untrained(contents: Contents, moc: MoCConfig) -> bool:
    """Returns whether weights that never saw Mixture of Contexts are asked to attend with it."""
    return not moc.dense and contents.stored_moc is None
