"""From latents that a sampler gives shot by shot to the files of a film."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.interfaces import Codec
from film.folder import FilmFolder
from film.storyboard import pick_frames

OnStep = Callable[[int, int], None]
Sampling = Callable[[OnStep], Iterable[tuple[int, Tensor]]]


@dataclass
class Film:
    """What was made. thumbnails: a few frames of each shot, uint8 [n, H, W, 3]."""

    num_frames: int = 0
    thumbnails: list[np.ndarray] = field(default_factory=list)


def make_film(folder: FilmFolder, fps: float, codec: Codec, sampling: Sampling) -> Film:
    """Writes each shot as soon as it is sampled, and all of them as one video.

    sampling: is told what to call after each step, with (steps done, steps in all), and yields (index in the stream,
    latent [C, T, H, W]) of each shot in order. Raises FloatingPointError, with the shot, where its pictures are not
    finite.
    """
    film, decode = Film(), codec.shot_decoder()
    with tqdm(desc="sample", unit="step") as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def frames() -> Iterator[np.ndarray]:
            for number, (_, latent) in enumerate(sampling(on_step), start=1):
                folder.write_latent(number, latent)
                shot = np.concatenate([pictures(piece, f"shot {number}") for piece in decode(latent)])
                folder.write_shot(number, shot, fps)
                film.thumbnails.append(shot[pick_frames(len(shot))])
                yield from shot

        film.num_frames = folder.write_video(frames(), fps)
    return film


def pictures(video: Tensor, of: str) -> np.ndarray:
    """Decoded float [3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]. Raises FloatingPointError, naming what they are
    `of`, where they are not finite: they would be shown as black."""
    if not video.isfinite().all():
        raise FloatingPointError(f"{of}: its latent is finite, its decoded pictures are not; the codec may hold nan")
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
