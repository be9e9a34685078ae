"""From a prompt script to what a sampler needs.

Codec and text encoder are handed in; of the codec this module knows the interface only (data/interfaces.py).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from data.interfaces import Codec
from data.media.images import read_image
from data.media.resize import fit
from film.script import Script
from moc.diffusion import Story, noise_key

# The noise of the picture before shot i has number PICTURES + i, that of reference i REFERENCES + i, whatever the seed:
# shots are numbered without them, and one made anew with another seed sees the same references.
PICTURES, REFERENCES = 1 << 20, 1 << 21


@dataclass
class FilmPlan:
    """The stream of a film. device: the codec's.

    shapes: (C, T, H, W) of each latent. cuts, noise_keys, text, negative: as in `moc.diffusion.Story`.
    given: latents of pictures: the script's references, each a one-frame shot of its own before all shots, and those of
        shots, each before the shot that shall look like it. A
        picture is encoded apart, never decoded, and a continuous codec does not count it as a shot. Its name in
        `pictures` tells its content. A cut stands before and after it.
    filmed, num_frames: where each of the script's shots stands in the stream, and its length. It is as long as the
        script says, and what its latent holds more is left out, unless the next shot goes on from there.
    """

    script: Script
    seed: int = 0
    device: torch.device | str = "cpu"
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)
    filmed: list[int] = field(default_factory=list)
    num_frames: list[int] = field(default_factory=list)
    cuts: list[bool] = field(default_factory=list)
    noise_keys: list[int] = field(default_factory=list)
    pictures: dict[Path, str] = field(default_factory=dict)
    text: list[Tensor] = field(default_factory=list)
    negative: list[Tensor] = field(default_factory=list)

    def encode_texts(self, encode: Callable[[str, Sequence[str]], list[Tensor]]) -> None:
        """Encodes what to steer to, and away from: the negative prompt as global caption, null shot captions."""
        self.text = encode(self.script.global_caption, self.captions)
        self.negative = encode(self.script.negative, [""] * len(self.captions))

    def story(self) -> Story:
        """What to sample; texts must be encoded."""
        return Story(
            self.shapes, self.text, self.negative, self.given, self.cuts, self.noise_keys, len(self.script.references)
        )

    def record(self) -> dict[str, Any]:
        """The script in its own form, as JSON has it, with every seed and with the pictures' names."""
        return self.script.record(self.seed, self.pictures)


def plan_film(script: Script, codec: Codec, device: torch.device | str = "cpu", seed: int = 0) -> FilmPlan:
    """Lays the stream of a script out; raises DataError for a size the codec cannot take. device: the codec's. seed:
    of the shots that have none of their own."""
    height, width = script.size
    factor = codec.spatial_factor
    if height % factor or width % factor:
        raise DataError("bad-script", "size", f"{height}x{width} is not a multiple of {factor}, as this codec needs")
    plan = FilmPlan(script, seed, device)

    def add(latent_frames: int, caption: str, cut: bool, key: int) -> None:
        plan.shapes.append((codec.latent_channels, latent_frames, height // factor, width // factor))
        plan.captions.append(caption)
        plan.cuts.append(cut)
        plan.noise_keys.append(key)

    def add_picture(image: Path, caption: str, key: int) -> None:
        plan.given[len(plan.shapes)] = codec.encode(fit(read_image(image), script.size).to(device))
        plan.pictures[image] = _content_name(image)
        add(1, caption, True, key)

    for number, reference in enumerate(script.references):
        add_picture(reference.image, reference.prompt, noise_key(0, REFERENCES + number))
    rest = 0.0  # what rounding took from the shots of one video so far, so that cuts stay where the script has them
    for place, shot in enumerate(script.shots):
        own_seed = seed if shot.seed is None else shot.seed
        if shot.image:
            add_picture(shot.image, shot.caption, noise_key(own_seed, PICTURES + place))
        plan.filmed.append(len(plan.shapes))
        wanted = shot.seconds * script.fps + (0 if codec.begins_video(place) else rest)
        ends = place + 1 == len(script.shots) or (script.shots[place + 1].begins_anew and codec.begins_video(place + 1))
        frames = max(1, round(wanted)) if ends else codec.nearest_frames(wanted, place)
        rest = wanted - frames
        plan.num_frames.append(frames)
        length = codec.latent_frames(codec.enclosing_frames(frames, place), place)
        add(length, shot.caption, shot.begins_anew, noise_key(own_seed, place))
    return plan


def _content_name(file: Path) -> str:
    return f"given/{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}{file.suffix.lower()}"
