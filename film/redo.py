"""This module prepares a film's script for shots to be made anew while the others stay."""

from collections.abc import Sequence
from dataclasses import replace

from data.errors import DataError
from data.interfaces import Codec
from film.folder import FilmFolder
from film.script import Script
from moc.errors import UserError


def with_seeds_of(folder: FilmFolder, script: Script, redo: Sequence[int], codec: Codec) -> Script:
    """Returns the script, with the seeds of the folder's film in the shots that stay as they are.

    redo: numbers of the shots, from 1, that are made anew. Raises DataError (no-film), and UserError where they cannot
    be made anew alone.
    """
    before = folder.request()
    if before is None:
        raise DataError("no-film", folder.path, f"holds no film to make shots {list(redo)} of anew; leave out redo")
    shots, old = script.shots, before["script"]["shots"]
    wrong = [number for number in redo if not 1 <= number <= min(len(shots), len(old))]
    if wrong:
        raise UserError(f"redo={list(redo)}: the film has shots 1 to {len(old)}, and no {wrong[0]}")
    given = [number for number in redo if shots[number - 1].video or "video" in old[number - 1]]
    if given:
        raise UserError(f"redo={list(redo)}: shot {given[0]} is a given video, which is not made; name others")
    if len(old) > 1 and not codec.begins_video(1):
        raise UserError(
            f"redo={list(redo)}: this codec makes one video of all shots, of which none can be made anew alone"
        )
    kept = [
        shot if number in redo or shot.seed is not None else replace(shot, seed=past["seed"])
        for number, (shot, past) in enumerate(zip(shots, old, strict=False), start=1)
    ]
    return replace(script, shots=(*kept, *shots[len(kept) :]))
