"""This module finds which films a command is to make: one of a script, or one of each script in a folder."""

from pathlib import Path

from data.errors import DataError
from film.folder import METADATA, FilmFolder

SUFFIXES = {".yaml", ".yml", ".json"}


def find_films(script: str | Path, out: str | Path) -> list[tuple[Path, FilmFolder]]:
    """Returns each script with its film's folder: `out` itself, or out/NAME for each NAME.yaml or NAME.json in a
    folder, but for the metadata.json of a film that was made there.

    Raises DataError where a folder holds no script, or two of one name, and where a film has no folder.
    """
    script, out = Path(script), Path(out)
    if not script.is_dir():
        return [(script, FilmFolder(out))]
    scripts = sorted(path for path in script.iterdir() if path.suffix.lower() in SUFFIXES and path.name != METADATA)
    names = [path.stem for path in scripts]
    if not scripts:
        raise DataError("no-scripts", script, "holds no script (.yaml, .yml or .json); name a file or another folder")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError("same-name", script, f"holds two scripts named {twice}, which would be one film; rename one")
    return [(path, FilmFolder(out / path.stem)) for path in scripts]
