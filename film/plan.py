"""This module makes what a sampler needs from a prompt script.

Codec and text encoder are handed in; this module knows only the codec's interface (data/interfaces.py).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from data.interfaces import Codec
from film.footage import Footage, picture
from film.script import Script, ScriptShot
from moc import StreamSpec
from moc.diffusion import Story, noise_key

# The noise of the picture before shot i has number PICTURES + i, that of reference i REFERENCES + i, whatever the seed:
# shots are numbered without them, and one made anew with another seed sees the same references.
PICTURES, REFERENCES = 1 << 20, 1 << 21


@dataclass
class FilmPlan:
    """A plan describes the stream of a film. device: the codec's.

    shapes: (C, T, H, W) of each latent. cuts, noise_keys, text, negative: as in `moc.diffusion.Story`.
    given: latents of pictures and of given videos. A picture is a one-frame shot of its own with a cut before and after
        it: the script's references stand before all shots, a shot's own picture stands before that shot. A picture
        is encoded apart, never decoded, and a continuous codec does not count it as a shot.
    ends: the last latent frame of shots that end in a picture.
    pictures: what the script names, under names that tell the content.
    filmed, num_frames: where each of the script's shots stands in the stream, and its length. It is as long as the
        script says; frames that its latent holds beyond that are left out, unless the next shot goes on from there.
    """

    script: Script
    seed: int = 0
    device: torch.device | str = "cpu"
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)
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

    def first(self, num_shots: int) -> "FilmPlan":
        """Returns the plan of the script's first shots."""
        end = self.filmed[num_shots - 1] + 1
        return replace(
            self,
            script=replace(self.script, shots=self.script.shots[:num_shots]),
            shapes=self.shapes[:end],
            captions=self.captions[:end],
            given={index: latent for index, latent in self.given.items() if index < end},
            ends={index: latent for index, latent in self.ends.items() if index < end},
            filmed=self.filmed[:num_shots],
            num_frames=self.num_frames[:num_shots],
            cuts=self.cuts[:end],
            noise_keys=self.noise_keys[:end],
            text=self.text[: 1 + end],
            negative=self.negative[: 1 + end],
        )

    def anew(self, numbers: Sequence[int]) -> "FilmPlan":
        """Returns the plan of some shots alone, counted from 1, for counting: of the others it has shapes and no
        latents."""
        stay = [index for number, index in enumerate(self.filmed, start=1) if number not in numbers]
        known = {index: torch.empty(self.shapes[index], device="meta") for index in stay}
        return replace(self, given=known | self.given)

    def story(self) -> Story:
        """Returns what to sample; texts must be encoded."""
        guidance: list[float | None] = [None] * len(self.shapes)
        for index, shot in zip(self.filmed, self.script.shots, strict=True):
            guidance[index] = shot.guidance
        return Story(
            self.shapes,
            self.text,
            self.negative,
            given=self.given,
            ends=self.ends,
            guidance=guidance,
            cuts=self.cuts,
            noise_keys=self.noise_keys,
            num_references=len(self.script.references),
        )

    def record(self) -> dict[str, Any]:
        """Returns the script in its own form, as JSON has it, with every seed and with the pictures' names."""
        return self.script.record(self.seed, self.pictures)


def check_size(size: tuple[int, int], codec: Codec, stream: StreamSpec) -> None:
    """Raises UserError for a size of films, in pixels, that codec or model cannot take. stream: the model's."""
    stream.grid(torch.Size((1, *_latent_size(size, codec))))


def _latent_size(size: tuple[int, int], codec: Codec) -> tuple[int, int]:
    (height, width), factor = size, codec.spatial_factor
    if height % factor or width % factor:
        nearest = [max(1, round(side / factor)) * factor for side in size]
        said = f"{height}x{width} is not a multiple of {factor}, as this codec needs; take {nearest}"
        raise DataError("bad-script", "size", said)
    return height // factor, width // factor


def plan_film(script: Script, codec: Codec, device: torch.device | str = "cpu", seed: int = 0) -> FilmPlan:
    """Lays the stream of a script out; raises DataError for a size the codec cannot take. device: the codec's. seed:
    of the shots that have none of their own."""
    height, width = _latent_size(script.size, codec)
    plan, encode = FilmPlan(script, seed, device), codec.shot_encoder()

    def add(latent_frames: int, caption: str, cut: bool, key: int) -> None:
        plan.shapes.append((codec.latent_channels, latent_frames, height, width))
        plan.captions.append(caption)
        plan.cuts.append(cut)
        plan.noise_keys.append(key)

    def add_picture(image: Path, caption: str, key: int) -> None:
        plan.given[len(plan.shapes)] = codec.encode(picture(image, script.size).to(device))
        plan.pictures[image] = _content_name(image)
        add(1, caption, True, key)

    for number, reference in enumerate(script.references):
        add_picture(reference.image, reference.prompt, noise_key(0, REFERENCES + number))
    # What rounding took from earlier shots of a video is given to the next one, so that cuts stay in place. A shot that
    # is a video of its own is rounded by itself: one made anew in another length leaves the others as they are.
    rest = 0.0
    for number, shot in enumerate(script.shots):
        own_seed = seed if shot.seed is None else shot.seed
        if shot.image:
            add_picture(shot.image, shot.caption, noise_key(own_seed, PICTURES + number))
        plan.filmed.append(len(plan.shapes))
        wanted = shot.seconds * script.fps + (0 if codec.begins_video(number) else rest)
        footage = Footage(shot.video, shot.start, shot.seconds, script.fps) if shot.video else None
        if footage:
            _check_order(script.shots, number, codec)
            wanted = min(wanted, len(footage.frames))
        frames = _num_frames(wanted, script.shots, number, codec)
        rest = wanted - frames
        plan.num_frames.append(frames)
        whole = codec.enclosing_frames(frames, number)
        length, index = codec.latent_frames(whole, number), len(plan.shapes)
        if footage:
            plan.given[index] = encode(footage.pieces(whole, script.size, device))
            plan.pictures[footage.file] = _content_name(footage.file)
        if shot.last_image:
            plan.ends[index] = _end(shot.last_image, length, script.size, codec, device)
            plan.pictures[shot.last_image] = _content_name(shot.last_image)
        add(length, shot.caption, shot.begins_anew, noise_key(own_seed, number))
    return plan


def counts_that_stay(counts: Tensor, before: dict[str, Any], now: dict[str, Any], redo: Sequence[int]) -> Tensor:
    """Returns the counts of a routing map, [layers, levels, S, S], for a film of which some shots, counted from 1, are
    made anew. The routes of these are not counted; the other shots' are, where what they go to is still in the stream,
    which a picture of a shot made anew may join or leave. before, now: the film's records (`FilmPlan.record`)."""
    old, new = _standing(before), _standing(now)
    stay = [name for name in old if name in new]
    source, target = (torch.tensor([names.index(name) for name in stay]) for names in (old, new))
    moved = counts.new_zeros(*counts.shape[:2], len(new), len(new))
    moved[:, :, target[:, None], target] = counts[:, :, source[:, None], source]
    moved[:, :, [new.index(("shot", number)) for number in redo]] = 0
    return moved


def _standing(record: dict[str, Any]) -> list[tuple[str, int]]:
    """Returns what stands in the stream of a film, in the order of `plan_film`: each thing's kind and number."""
    found = [("reference", number) for number in range(len(record.get("references", [])))]
    for number, shot in enumerate(record["shots"], start=1):
        found += [("picture", number)] * ("image" in shot) + [("shot", number)]
    return found


def _num_frames(wanted: float, shots: Sequence[ScriptShot], number: int, codec: Codec) -> int:
    """Returns how many frames a shot of `wanted` ones has: whole latent frames where the next shot goes on from it."""
    if number + 1 == len(shots) or (shots[number + 1].begins_anew and codec.begins_video(number + 1)):
        return max(1, round(wanted))
    frames = codec.nearest_frames(wanted, number)
    if shots[number].video and frames > wanted:  # a given video must not stand still before the next shot
        return codec.whole_frames(round(wanted), number) or frames
    return frames


def _check_order(shots: Sequence[ScriptShot], number: int, codec: Codec) -> None:
    """Raises DataError where a given video cannot be encoded: a continuous codec needs the shots before it."""
    if not codec.begins_video(number) and not all(shot.video for shot in shots[:number]):
        raise DataError(
            "bad-script",
            f"shots[{number}].video",
            "stands after a shot that is to be made; this codec makes one video of all shots, in which given ones come "
            "first",
        )


def _end(image: Path, latent_frames: int, size: tuple[int, int], codec: Codec, device: torch.device | str) -> Tensor:
    """Returns the last latent frame [C, 1, H', W'] of a shot that ends in a picture: that of a still video of it. A
    latent frame depends on those before it; after three, where the video began no longer counts."""
    frames = codec.enclosing_frames(1)
    while codec.latent_frames(frames) < min(3, latent_frames):
        frames = codec.enclosing_frames(frames + 1)
    still = picture(image, size).to(device)
    return codec.encode(still.expand(-1, frames, -1, -1).contiguous())[:, -1:]


def _content_name(file: Path) -> str:
    with file.open("rb") as opened:
        return f"given/{hashlib.file_digest(opened, 'sha256').hexdigest()[:16]}{file.suffix.lower()}"
