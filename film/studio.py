"""This module keeps a folder in which a person writes scripts and films them: it is the app without its page.

scripts/NAME.yaml, with the pictures that they name      films/NAME/       as `film.folder` has it
films/NAME/takes/03_1.mp4    shot 3 as first made        previews/DIGEST/  the same film, in few steps
films/NAME/takes/03_1.json   what it was asked to be     earlier/NAME_1/   a film of NAME as its script was before

Every name is checked, and nothing is read or written outside the folder.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import yaml

from data.errors import DataError
from film.fields import seed_of
from film.filmmaker import Filmmaker
from film.folder import FilmFolder
from film.redo import with_seeds_of
from film.script import Script, ScriptShot
from film.shooting import OnStep
from moc.diffusion import Progress
from moc.errors import UserError
from moc.files import copy_whole, inside, write_whole

_NAME = re.compile(r"\w[\w -]{0,63}")
_SHOWN = {".png", ".jpg", ".jpeg", ".webp", ".mp4", ".mov", ".mkv", ".webm"}  # kinds of files that a script may name


@dataclass(frozen=True)
class State:
    """A state tells how far a film is. done: the share of its steps. shots: the videos of its finished shots, in order.
    num_shots: of the whole film. folder: the film's."""

    done: float
    shots: list[Path]
    num_shots: int
    folder: FilmFolder


class _Stopped(Exception):
    """This error says that nobody waits for a film any more; what is finished of it is kept."""


class Studio:
    """A studio manages scripts and films in one folder. preview_steps: the steps of a preview."""

    def __init__(self, filmmaker: Filmmaker, folder: str | Path, preview_steps: int = 8) -> None:
        self.filmmaker, self.folder, self.preview_steps = filmmaker, Path(folder).resolve(), preview_steps
        (self.folder / "scripts").mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Returns the names of the scripts."""
        return sorted(path.stem for path in (self.folder / "scripts").glob("*.yaml") if _NAME.fullmatch(path.stem))

    def film(self, name: str) -> FilmFolder:
        """Returns the folder of the film of a script."""
        return FilmFolder(self._path("films", name))

    def text(self, name: str) -> str:
        """Returns the script as it is written."""
        path = self._script(name)
        if not path.is_file():
            raise UserError(
                f"there is no script {name}; write one, or choose one of {', '.join(self.names()) or 'none'}"
            )
        return path.read_text(encoding="utf-8")

    def read(self, name: str) -> Script:
        self.text(name)
        return self.filmmaker.read(self._script(name))

    def shot(self, name: str, number: int) -> ScriptShot:
        """Returns a shot of a script, counted from 1."""
        shots = self.read(name).shots
        if not 1 <= number <= len(shots):
            raise UserError(f"{name} has shots 1 to {len(shots)}, and no {number}")
        return shots[number - 1]

    def save(self, name: str, text: str) -> str:
        """Keeps a script of any known form in ours; returns it. Raises UserError with what is wrong in it, and keeps
        the script of that name as it was."""
        path = self._script(name)
        as_json = path.with_suffix(".json") if text.lstrip().startswith("{") else path
        return self._keep(path, self.filmmaker.read(as_json, text=text))

    def add(self, file: Path) -> str:
        """Copies a picture or a video beside the scripts; returns the name that a script has for it. Raises UserError
        for a file of another kind, and where one of that name has other content."""
        if file.suffix.lower() not in _SHOWN:
            raise UserError(f"{file.name} is no picture or video by its name; add {', '.join(sorted(_SHOWN))}")
        path = inside(self.folder, f"scripts/{file.name}", follow_links=True)
        if path.exists() and path.read_bytes() != file.read_bytes():
            raise UserError(f"there is another {file.name}, which a script may name; rename yours")
        copy_whole(file, path)
        return file.name

    def estimate(self, name: str, **sampler: Any) -> str:
        """Returns what a film will cost. sampler: settings of sampling other than the filmmaker's."""
        filmmaker = self.filmmaker.with_sampler(**sampler)
        return "\n".join(filmmaker.cost(filmmaker.plan(self.read(name))))

    def preview(self, name: str, **sampler: Any) -> Iterator[State]:
        """Films a script in few steps, to see where it goes; tells how far it is. sampler: as for `estimate`."""
        filmmaker = self.filmmaker.with_sampler(**sampler | {"steps": self.preview_steps})
        return self._make(filmmaker, name, self.preview_folder(name, filmmaker))

    def preview_folder(self, name: str, filmmaker: Filmmaker) -> FilmFolder:
        """Returns the folder of the preview of a script that a filmmaker makes, which is named by all that decides its
        frames: no preview stands in another one's way."""
        request = json.dumps(filmmaker.request(filmmaker.plan(self.read(name))), sort_keys=True)
        return FilmFolder(inside(self.folder, f"previews/{hashlib.sha256(request.encode()).hexdigest()[:16]}"))

    def make(self, name: str, **sampler: Any) -> Iterator[State]:
        """Films a script, or goes on with it, and tells how far it is. Who stops listening stops it; what is finished
        is kept, and so is a film of the script or of settings as they were before, among the earlier ones. sampler: as
        for `estimate`."""
        filmmaker = self.filmmaker.with_sampler(**sampler)
        self._set_aside(name, filmmaker)
        return self._make(filmmaker, name, self.film(name))

    def redo(self, name: str, number: int, prompt: str, seed: int) -> Iterator[State]:
        """Makes one shot of a whole film anew, sampled as the others were. The take before it is kept, to compare
        them."""
        script, film = self.read(name), self.film(name)
        if not film.is_finished:
            raise UserError(f"{name} is not filmed to its end; generate it before a shot of it is made anew")
        if not prompt.strip():
            raise UserError("the prompt is empty; say what the shot shows")
        shots = list(script.shots)
        shot = self.shot(name, number)
        shots[number - 1] = replace(shot, prompt=prompt.strip(), seed=seed_of(seed, f"{name} shots[{number - 1}].seed"))
        made = film.request() or {}
        before = made["sampler"]
        filmmaker = self.filmmaker.with_sampler(steps=before["steps"], guidance_scale=before["guidance_scale"])
        script = with_seeds_of(film, replace(script, shots=tuple(shots)), [number], filmmaker.encoders.codec)
        film.check_request(filmmaker.request(filmmaker.plan(script)), [number])
        take = self._takes(film) / f"{number:02d}_{len(self.takes(name, number))}.mp4"
        copy_whole(film.shot(number), take)
        write_whole(take.with_suffix(".json"), json.dumps(made["script"]["shots"][number - 1]).encode())
        self._keep(self._script(name), script)
        return self._make(filmmaker, name, film, [number])

    def _set_aside(self, name: str, filmmaker: Filmmaker) -> None:
        """Moves a film away that is another one than is now asked for."""
        film = self.film(name)
        try:
            film.check_request(filmmaker.request(filmmaker.plan(self.read(name))))
        except DataError as error:
            if error.kind != "other-film":
                raise
            paths = (self._path("earlier", name, f"_{number}") for number in count(1))
            path = next(path for path in paths if not path.exists())
            path.parent.mkdir(exist_ok=True)
            with film.held():
                film.path.rename(path)

    def takes(self, name: str, number: int) -> list[Path]:
        """Returns the videos of all takes of a shot, the first one first."""
        film = self.film(name)
        before = sorted(self._takes(film).glob(f"{number:02d}_*.mp4"), key=lambda path: int(path.stem.split("_")[1]))
        return [*before, *(path for path in [film.shot(number)] if path.exists())]

    def before(self, name: str, number: int) -> tuple[str, int]:
        """Returns prompt and seed of the take of a shot before the newest one: with them it is made again as it was."""
        earlier = self.takes(name, number)[:-1]
        record = earlier[-1].with_suffix(".json") if earlier else None
        if record is None or not record.exists():
            raise UserError(f"shot {number} of {name} has no take before this one that is known")
        shot = json.loads(record.read_text(encoding="utf-8"))
        return shot["prompt"], shot["seed"]

    def _takes(self, film: FilmFolder) -> Path:
        return film.path / "takes"

    def _script(self, name: str) -> Path:
        return self._path("scripts", name, ".yaml")

    def _path(self, kind: str, name: str, suffix: str = "") -> Path:
        if not _NAME.fullmatch(name or ""):
            raise UserError(f"{name!r} is no name for a film; use up to 64 letters, digits, spaces, - and _")
        return inside(self.folder, f"{kind}/{name}{suffix}", follow_links=True)

    def _keep(self, path: Path, script: Script) -> str:
        """Writes a script in our form. A shot without a seed has the film's."""
        files = [file for shot in script.shots for file in (shot.image, shot.last_image, shot.video) if file]
        files += [reference.image for reference in script.references]
        names = {file: str(file.relative_to(path.parent)) for file in files}
        record = script.record(self.filmmaker.sampler.seed, names)
        text = yaml.safe_dump(record, allow_unicode=True, sort_keys=False, width=100)
        write_whole(path, text.encode())
        return text

    def _make(
        self, filmmaker: Filmmaker, name: str, film: FilmFolder, redo: list[int] | None = None
    ) -> Iterator[State]:
        script = self.read(name)
        numbers = range(1, len(script.shots) + 1)
        # Who closes this closes the thread's too, and waits until the film's folder is free.
        with closing(_in_a_thread(lambda watch: filmmaker.make([(script, film)], redo or [], watch))) as making:
            for done in making:
                shots = [film.shot(number) for number in numbers if film.shot(number).exists()]
                yield State(done, shots, len(numbers), film)


def _in_a_thread(work: Callable[[OnStep], None]) -> Generator[float]:
    """Does work elsewhere and yields the share of its steps that are done, 0 first and 1 last. Raises what it raises;
    who stops listening stops it at its next step."""
    told: Queue[float] = Queue()
    is_left, errors = threading.Event(), []

    def watch(progress: Progress) -> None:
        told.put(progress.step / progress.num_steps)
        if is_left.is_set():
            raise _Stopped

    def run() -> None:
        try:
            work(watch)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield 0.0
        while thread.is_alive() or not told.empty():
            try:
                yield min(0.99, told.get(timeout=0.2))
            except Empty:
                continue
        if errors:
            raise errors[0]
        yield 1.0
    finally:
        is_left.set()
        thread.join()
