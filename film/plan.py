"""From a prompt script to what a sampler needs.

Codec and text encoder are handed in; this module knows their interface only (data/interfaces.py).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.errors import DataError
from data.interfaces import Codec, TextEncoder
from data.media.images import read_image
from data.media.resize import fit
from film.script import Script


@dataclass
class FilmPlan:
    """The stream of a film. shapes: (C, T, H, W) of each latent. given: latents of reference pictures, each a one-frame
    shot of its own before the shot that shall look like it, encoded apart, never decoded, and no shot to a continuous
    codec. filmed: where the script's shots stand in the stream. cuts: as in `moc.Sample`; around a picture always."""

    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)
    filmed: list[int] = field(default_factory=list)
    cuts: list[bool] = field(default_factory=list)

    def texts(self, encoder: TextEncoder, script: Script) -> tuple[list[Tensor], list[Tensor]]:
        """Features to steer to, and away from: the negative prompt as global caption, null shot captions."""
        nulls = [""] * len(self.captions)
        return encoder.encode(script.global_caption, self.captions), encoder.encode(script.negative, nulls)


def plan_film(script: Script, codec: Codec, device: torch.device | str = "cpu") -> FilmPlan:
    """Lays the stream of a script out; raises DataError for a size the codec cannot take. device: the codec's."""
    height, width = script.size
    factor = codec.spatial_factor
    if height % factor or width % factor:
        raise DataError("bad-script", "size", f"{height}x{width} is not a multiple of {factor}, as this codec needs")
    plan = FilmPlan()
    rest = 0.0  # what rounding took from the shots of one video so far, so that cuts stay where the script has them
    for place, shot in enumerate(script.shots):
        if shot.image:
            picture = fit(read_image(shot.image), script.size).to(device)
            plan.given[len(plan.shapes)] = codec.encode(picture)
            plan.shapes.append((codec.latent_channels, 1, height // factor, width // factor))
            plan.captions.append(shot.caption)
            plan.cuts.append(True)
        plan.filmed.append(len(plan.shapes))
        wanted = shot.seconds * script.fps + (0 if codec.begins_video(place) else rest)
        frames = codec.nearest_frames(wanted, place)
        rest = wanted - frames
        length = codec.latent_frames(frames, place)
        plan.shapes.append((codec.latent_channels, length, height // factor, width // factor))
        plan.captions.append(shot.caption)
        plan.cuts.append(shot.cut or shot.image is not None)
    return plan
