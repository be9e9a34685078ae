"""A film has one folder, in which sampling writes each file whole or not at all:

latents/01.safetensors, shots/01.mp4, ...    as soon as a shot is known
video.mp4                                    the shots one after another
metadata.json                                everything to repeat the film; written when the film is whole
routing.safetensors                          how often each shot routed to each other, by layer and noise level
index.html, storyboard.png, storyboard_2.png, ..., routing.png; if asked video.srt, video.vtt, preview.webp
                                             what to look at; the film is whole without them
001_002.mp4, ...                             shots once more, by the scene and shot of a benchmark's script
given/<digest>.png, ...                      copies of the pictures and videos that its script names
.progress.safetensors                        how far an unfinished film is, and what it was asked to be

A film is tied to its request, a JSON object of all that decides its frames: another request in its folder is refused.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data.cache.store import checksum
from data.errors import DataError
from data.media.index import to_rgb
from data.media.write import join_videos, write_video
from data.records import write_whole
from film.request import REQUEST, difference, other_shots, shot_of
from moc.earlier import MOC, SAMPLER
from moc.errors import UserError
from moc.files import PARTIAL, copy_whole, held
from moc.training.checkpoint import read_json

VIDEO, METADATA, PROGRESS = "video.mp4", "metadata.json", ".progress.safetensors"
ROUTING = "routing.safetensors"
SCENES = "[0-9][0-9][0-9]_[0-9][0-9][0-9].mp4"
GIVEN = f"given/{'[0-9a-f]' * 16}.*"
DRAWN = ("index.html", "storyboard*.png", "routing.png", "video.srt", "video.vtt", "preview.webp")  # once it is whole
FILES = ("latents/*.safetensors", "shots/*.mp4", VIDEO, METADATA, ROUTING, *DRAWN)
REMEDY = "name another folder, or remove this one"
logger = logging.getLogger(__name__)


@dataclass
class FilmProgress:
    """This record says how far an unfinished film is. step: that of sampling. made: the checksum of each finished
    shot's latent, by the shot's number, which counts from 1. redo: the shots that are made anew, in a film that was
    whole before. tensors: whatever else sampling goes on from."""

    step: int = 0
    made: dict[int, int] = field(default_factory=dict)
    redo: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """This record says what is not there of a film. latents, shots: numbers of the shots, from 1, whose latent or video
    is not. film: whether the joined video is not."""

    latents: set[int]
    shots: set[int]
    film: bool


class FilmFolder:
    """This object keeps one film in a folder, which is made when it is first written to. Raises DataError (film-exists,
    not-a-folder) where it cannot: a shorter film, for example, would leave the last shots of a longer one there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise DataError("not-a-folder", self.path, "is a file; name a folder for the film")
        there = next((file for pattern in FILES for file in sorted(self.path.glob(pattern))), None)
        if there is not None and self.request() is None:
            raise DataError(
                "film-exists", self.path, f"already holds {there.relative_to(self.path)} of a film; name another folder"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder, made if need be, for this process alone. Raises HeldError where another one films there."""
        with held(self.path):
            for path in self.path.rglob(f".*{PARTIAL}"):  # a process that was killed left these
                path.unlink()
            yield

    @property
    def is_finished(self) -> bool:
        return not (self.path / PROGRESS).exists() and (self.path / METADATA).exists()

    def check_request(self, request: Mapping[str, Any], redo: Sequence[int] = ()) -> None:
        """Raises DataError (other-film) where the folder holds a film, finished or not, of another request. redo: shots
        of a finished film that may differ, and must (same-shot), unless they are lost: the same prompt and seed would
        give the same shot. Those of an unfinished film must be the ones that it makes anew (unfinished-film)."""
        before, now = self.request(), json.loads(json.dumps(request))
        if before is None:
            return
        if redo:
            self._check_redo(redo, before, now)
        for number in redo if self.is_finished else ():
            before["script"]["shots"][number - 1] = shot_of(now, number)
        if changed := difference(before, now):
            remedy = self._remedy(before, now) if not redo else REMEDY
            raise DataError("other-film", self.path, f"holds another film: {changed}; {remedy}")

    def _check_redo(self, redo: Sequence[int], before: dict[str, Any], now: dict[str, Any]) -> None:
        """Raises DataError where shots cannot be made anew: same-shot, unfinished-film. before, now: the requests."""
        if self.is_finished:
            there = [number for number in redo if self._latent(number).exists()]  # a lost shot may be what it was
            same = [number for number in there if before["script"]["shots"][number - 1] == shot_of(now, number)]
            if same:
                raise DataError("same-shot", self.path, f"shot {same[0]} is asked to be what it is; change its prompt, "
                                "its seed in the script, or sampler.seed")  # fmt: skip
        elif sorted(set(redo)) != (begun := self._read_progress()[1].redo):
            first = f"shots {begun} of it are being made anew; say redo={begun}" if begun else "leave out redo"
            said = f"is not finished, which goes before redo={list(redo)}: {first}, and finish it first"
            raise DataError("unfinished-film", self.path, said)

    def _remedy(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        """Returns what to do where the folder holds the film of another request."""
        if self.is_finished:
            anew = other_shots(before, now)
            return f"make anew with redo={anew}, {REMEDY}" if anew else REMEDY
        begun = self._read_progress()[1].redo
        return f"shots {begun} of it are being made anew; finish that as it was asked for" if begun else REMEDY

    def reopen(self, request: Mapping[str, Any], redo: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """Makes a finished film an unfinished one, without the shots `redo`. tensors: as in `FilmProgress`."""
        others = set(range(1, len(request["script"]["shots"]) + 1)) - set(redo)
        made = {number: checksum(self.read_latent(number)) for number in sorted(others)}
        self.keep(request, FilmProgress(0, made, sorted(set(redo)), tensors))

    def request(self) -> dict[str, Any] | None:
        """Returns the request of the film that the folder holds; None where it holds none."""
        if (self.path / PROGRESS).exists():
            record = self._read_progress()[0]
        else:
            try:
                record = self.read_metadata()
            except (FileNotFoundError, UserError):  # the folder holds no film that we made
                return None
        known = {name: record[name] for name in (*REQUEST, "video") if name in record}
        if not known.keys() >= set(REQUEST):
            return None
        return known | {"moc": MOC.translated(record["moc"]), "sampler": SAMPLER.translated(record["sampler"])}

    # An unfinished film

    def keep(self, request: Mapping[str, Any], kept: FilmProgress) -> None:
        """Keeps how far the film is, in the place of what was kept before."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in kept.tensors.items()}
        state = {"request": request, "step": kept.step, "made": kept.made, "redo": kept.redo}
        text = json.dumps(state | {"crc32": {name: checksum(tensor) for name, tensor in tensors.items()}})
        metadata = {"state": text, "crc32": str(zlib.crc32(text.encode()))}
        write_whole(self.path / PROGRESS, save(tensors, metadata))

    @contextmanager
    def emptied_unless_begun(self) -> Iterator[None]:
        """Empties the folder where the block raises before a step or a shot is kept: a film that was refused must not
        keep the folder from another."""
        try:
            yield
        except BaseException:
            if (self.path / PROGRESS).exists():
                request, kept = self._read_progress()
                if not (kept.step or kept.made or kept.redo):
                    self._remove_begun(len(request["script"]["shots"]))
            raise

    def _remove_begun(self, num_shots: int) -> None:
        """Removes what a film of so many shots, of which nothing is kept, may have written; its request last."""
        for number in range(1, num_shots + 1):
            self._latent(number).unlink(missing_ok=True)
            self.shot(number).unlink(missing_ok=True)
        for path in self.path.glob(GIVEN):
            path.unlink()
        self.remove_pictures()
        self.forget()

    def kept(self) -> FilmProgress:
        """Returns what was kept last; raises DataError (damaged-film) where it or a latent of it is not as written."""
        if not (self.path / PROGRESS).exists():
            return FilmProgress()
        _, kept = self._read_progress()
        for number, crc32 in kept.made.items():
            if checksum(self.read_latent(number)) != crc32:
                raise self._damaged(self._latent(number))
        return kept

    def forget(self) -> None:
        """Lets go of what is kept, once the film is whole."""
        (self.path / PROGRESS).unlink(missing_ok=True)

    def _read_progress(self) -> tuple[dict[str, Any], FilmProgress]:
        file = self.path / PROGRESS
        try:
            with safe_open(file, framework="pt") as opened:
                fields = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            state = json.loads(fields["state"])
            whole = zlib.crc32(fields["state"].encode()) == int(fields["crc32"])
            whole &= state["crc32"] == {name: checksum(tensor) for name, tensor in tensors.items()}
        except (SafetensorError, KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise self._damaged(file)
        made = {int(number): crc32 for number, crc32 in state["made"].items()}
        return state["request"], FilmProgress(state["step"], made, state["redo"], tensors)

    def _damaged(self, file: Path, remedy: str = REMEDY) -> DataError:
        return DataError("damaged-film", file, f"is not what was written; {remedy}")

    # Files of the film

    def missing(self, num_shots: int) -> Missing:
        """Returns what is not there of a film of so many shots, of what cannot be drawn again from its videos; a video
        that cannot be read is not."""
        numbers = range(1, num_shots + 1)
        latents = {number for number in numbers if not self._latent(number).exists()}
        shots = {number for number in numbers if not self._opens(self.shot(number))}
        return Missing(latents, shots, not self._opens(self.path / VIDEO))

    def lost(self, numbers: Sequence[int]) -> DataError:
        """Returns the error of a whole film that holds neither whole videos nor latents of some shots."""
        said = f"shot {numbers[0]}" if len(numbers) == 1 else f"shots {list(numbers)}"
        remedy = f"make anew with redo={list(numbers)}, {REMEDY}"
        return DataError(
            "lost-shot", self.path, f"has lost {said}, of which neither a whole video nor a latent is there; {remedy}"
        )

    def _latent(self, number: int) -> Path:
        return self.path / f"latents/{number:02d}.safetensors"

    def shot(self, number: int) -> Path:
        """Returns the video of a shot, counted from 1."""
        return self.path / f"shots/{number:02d}.mp4"

    def write_latent(self, number: int, latent: Tensor) -> int:
        """Writes the latent [C, T, H, W] of a shot; returns its checksum."""
        latent = latent.cpu().contiguous()
        write_whole(self._latent(number), save({"latent": latent}))
        return checksum(latent)

    def read_latent(self, number: int) -> Tensor:
        """Returns the latent of a shot; raises DataError (damaged-film) where it cannot be read."""
        try:
            return load_file(self._latent(number))["latent"]
        except (SafetensorError, KeyError, FileNotFoundError):
            raise self._damaged(self._latent(number)) from None

    def write_shot(self, number: int, frames: Iterable[np.ndarray], fps: float, codec: str, crf: int) -> int:
        """Writes the frames of a shot, uint8 [H, W, 3] each, as `VideoConfig` has codec and crf; returns how many."""
        return write_video(self.shot(number), frames, fps, codec, crf, bt709=True)

    def join_shots(self, num_shots: int, chapters: Sequence[str] | None = None) -> int:
        """Joins all shots as one video, their frames as they are, and as chapters of these titles; returns how many."""
        shots = [self.shot(number) for number in range(1, num_shots + 1)]
        return join_videos(self.path / VIDEO, shots, chapters)

    @contextmanager
    def _opened(self, video: Path) -> Iterator[av.container.InputContainer]:
        """Opens a video of the film. Raises DataError (damaged-film) where it cannot be read, FileNotFoundError."""
        try:
            with av.open(str(video)) as container:
                if not container.streams.video:  # as in a file whose end is missing
                    raise EOFError
                yield container
        except (av.error.InvalidDataError, EOFError):
            raise self._damaged(video, "the command that made the film writes it again") from None

    def _opens(self, video: Path) -> bool:
        try:
            with self._opened(video):
                return True
        except (DataError, FileNotFoundError):
            return False

    def num_frames(self, number: int) -> int:
        """Returns how many frames the video of a shot has."""
        with self._opened(self.shot(number)) as container:
            return container.streams.video[0].frames

    def frames(
        self, number: int, pick: Callable[[int], list[int]], fit: Callable[[int, int], tuple[int, int]]
    ) -> np.ndarray:
        """Returns some frames of a shot as its video shows them, uint8 [n, H, W, 3]. pick: which, of how many. fit: the
        size that they get, of the (height, width) they have. Raises what opening the video does."""
        with self._opened(self.shot(number)) as container:
            stream, reformatter = container.streams.video[0], VideoReformatter()
            stream.thread_type = "AUTO"
            wanted, size = pick(stream.frames), fit(stream.height, stream.width)
            frames = enumerate(islice(container.decode(stream), wanted[-1] + 1))
            shown = [to_rgb(frame, reformatter, size) for index, frame in frames if index in wanted]
            if len(shown) < len(set(wanted)):
                raise EOFError
            return np.stack(shown)

    def copy_pictures(self, names: Mapping[Path, str]) -> None:
        """Copies the pictures and videos of a script to where its record names them."""
        for file, name in names.items():
            if not (self.path / name).exists():  # the name is made of the content's digest
                copy_whole(file, self.path / name)

    def read_metadata(self) -> dict[str, Any]:
        return read_json(self.path / METADATA)

    def redone(self) -> list[int]:
        """Returns the numbers of the shots that were made anew since the film was whole for the first time."""
        try:
            return list(self.read_metadata().get("redone", []))
        except FileNotFoundError:  # the film was never whole
            return []

    def write_routing(self, counts: Tensor) -> None:
        """Writes the counts of the film's routing map (`moc.statistics.RoutingMap`)."""
        write_whole(self.path / ROUTING, save({"counts": counts.cpu().contiguous()}))

    def read_routing(self) -> Tensor:
        """Returns the counts of the film's routing map; of an older film without that file what its metadata say of
        them."""
        path = self.path / ROUTING
        if not path.exists():
            return torch.tensor(self.read_metadata()["routing"])[None, None]
        try:
            return load_file(path)["counts"]
        except (SafetensorError, KeyError):
            raise self._damaged(path) from None

    def remove_pictures(self) -> None:
        """Removes what was drawn of the film as it was before."""
        for pattern in (*DRAWN, SCENES):
            for path in self.path.glob(pattern):
                path.unlink()

    def write_metadata(self, record: dict[str, Any]) -> None:
        """Writes what makes the film repeatable, as JSON; what JSON does not know is written as text."""
        text = json.dumps(record, indent=2, default=str) + "\n"
        write_whole(self.path / METADATA, text.encode())

    def draw(self, name: str, draw: Callable[[Path], None]) -> None:
        """Has `draw` make a picture or a video of the film at a path, unless it is there. One that fails costs no more
        than itself: a warning."""
        path = self.path / name
        if self._opens(path) if path.suffix == ".mp4" else path.exists():
            return
        try:
            draw(path)
        except Exception as error:
            logger.warning("%s is left out, the film is whole (%s: %s)", path, type(error).__name__, error)

    def file_shot(self, number: int, path: Path) -> None:
        """Gives the video of a shot another name: a hard link, or a copy where the disk knows none."""
        try:
            os.link(self.shot(number), path)
        except OSError:
            copy_whole(self.shot(number), path)

    def files(self) -> list[Path]:
        """Lists what there is to look at."""
        return [path for pattern in (VIDEO, *DRAWN) for path in sorted(self.path.glob(pattern))]
