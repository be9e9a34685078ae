"""This module finds which films a command is to make, one of a script or one of each script in a folder, reads their
scripts and tells what they will cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import DataError
from film.filmmaker import Filmmaker
from film.folder import METADATA, FilmFolder
from film.plan import check_size
from film.redo import with_seeds_of
from film.script import Script
from moc.errors import Refusals

SUFFIXES = {".yaml", ".yml", ".json"}


def find_films(script: str | Path, out: str | Path, refusals: Refusals) -> list[tuple[Path, FilmFolder]]:
    """Returns each script with its film's folder: `out` itself, or out/NAME for each NAME.yaml or NAME.json in a
    folder, but for the metadata.json of a film that was made there. A script whose film cannot have its folder is left
    out and noted.

    Raises DataError where a folder holds no script, or two of one name.
    """
    script, out = Path(script), Path(out)
    if not script.is_dir():
        return _with_folders({script: out}, refusals)
    scripts = sorted(path for path in script.iterdir() if path.suffix.lower() in SUFFIXES and path.name != METADATA)
    names = [path.stem for path in scripts]
    if not scripts:
        raise DataError("no-scripts", script, "holds no script (.yaml, .yml or .json); name a file or another folder")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError("same-name", script, f"holds two scripts named {twice}, which would be one film; rename one")
    return _with_folders({path: out / path.stem for path in scripts}, refusals)


def _with_folders(paths: Mapping[Path, Path], refusals: Refusals) -> list[tuple[Path, FilmFolder]]:
    found = []
    for script, path in paths.items():
        with refusals.noted():
            found.append((script, FilmFolder(path)))
    return found


def read_films(
    found: Sequence[tuple[Path, FilmFolder]],
    filmmaker: Filmmaker,
    refusals: Refusals,
    size: list[int] | None = None,
    fps: float | None = None,
) -> list[tuple[Script, FilmFolder]]:
    """Returns the scripts that `find_films` found, with their films' folders; computes nothing. Those that cannot be
    read, or whose size codec or model cannot take, are left out and noted. size, fps: as in `Filmmaker.read`."""
    read, films = [], []
    for path, folder in found:
        with refusals.noted():
            read.append((path, filmmaker.read(path, size, fps), folder))
    if read:  # what is wrong with the model is no script's fault, and not noted
        codec, stream = filmmaker.encoders.codec, filmmaker.stream
    for path, script, folder in read:
        with refusals.noted(path):
            check_size(script.size, codec, stream)
            films.append((script, folder))
    return films


def tell_costs(
    films: Sequence[tuple[Script, FilmFolder]], filmmaker: Filmmaker, refusals: Refusals, redo: Sequence[int] = ()
) -> None:
    """Prints what each film will cost, or its shots `redo` alone if they are made anew. Scripts that cannot be encoded
    and films whose shots cannot be made anew are noted as `refusals`."""
    for script, folder in films:
        with refusals.noted(folder.path if len(films) > 1 else ""):
            if redo:
                script = with_seeds_of(folder, script, redo, filmmaker.encoders.codec)
            plan = filmmaker.plan(script)
            cost = filmmaker.cost(plan.anew(redo) if redo else plan)
            print(f"{folder.path}: {script.title}", *cost, sep="\n", flush=True)
