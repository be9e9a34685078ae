"""This module writes the report of an evaluation: one HTML page, with storyboards side by side."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np

from data.records import write_whole
from evaluation.estimates import FEWEST
from evaluation.films.published import NOT_COMPARABLE, SIX, beside_the_paper
from evaluation.films.shown import Film
from film.page import data_url
from film.storyboard import pick_frames
from moc.counts import count_of

_TEMPLATE = Path(__file__).with_name("comparison_page.html.j2")
_PICTURES, _PICTURE_HEIGHT = 3, 96
Board = list[dict[str, Any]]  # the prompt and pictures of each shot of a film


def write_page(
    path: Path,
    losses: list[dict],
    scores: list[dict],
    boards: Sequence[Sequence[Board]],
    vbench: dict[str, dict[str, float]],
) -> None:
    """Writes the page.

    losses: rows of `evaluation.rivals`, as dicts. scores: those of each name, by `evaluation.films.scores`. boards: the
    storyboards of each name's films. vbench: by name, what VBench measured.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = shown
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        losses=losses,
        scores=scores,
        six=list(SIX.values()),
        published=beside_the_paper(vbench),
        note=NOT_COMPARABLE,
        fewest=FEWEST,
        stories=side_by_side(boards),
    )
    write_whole(path, page.encode(errors="replace"))


def shown(value: Any) -> str:
    """Returns a number as a table has it: a mean with half its interval, or a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, dict) and "mean" in value:
        half = "" if value.get("half") is None else f" ± {value['half']:.3f}"
        count = f" ({value['count']})" if "count" in value else ""
        return f"{value['mean']:.3f}{half}{count}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def told(score: dict[str, Any]) -> str:
    """Returns the scores of a name as lines to read, with the words of the page."""
    cuts, motion = score["cuts"], score["motion"]
    counts = f"{count_of(score['films'], 'film')}, {count_of(score['shots'], 'shot')}"
    lines = [
        f"{score['name']}: {counts}, {score['seconds']:.1f} s",
        f"cuts found of the scripted {shown(cuts['recall'])}, accuracy {shown(cuts['score'])}",
        f"motion {shown(motion['heights_a_second'])} heights a second, still shots {shown(motion['still'])}",
    ]
    for row in score["consistency"]:
        lines.append(
            f"{row['features']}: within shots {shown(row['intra'])}, same name {shown(row['same_name'])}, "
            f"other names {shown(row['other_name'])}, difference {shown(row['same_minus_other'])}"
        )
    if score["drift"]:
        slopes = ", ".join(f"{name} {100 * slope['a_shot']:+.2f} %" for name, slope in score["drift"].items())
        lines.append(f"drift from shot to shot: {slopes}")
    if score["text_alignment"]:
        lines.append(f"text alignment {shown(score['text_alignment'])}")
    return "\n  ".join(lines)


def board(film: Film) -> Board:
    """Returns the storyboard of a film, small enough to keep."""
    shots = []
    for shot in film.shots:
        chosen = [_thumbnail(shot.pictures[index]) for index in pick_frames(len(shot.pictures), _PICTURES)]
        shots.append({"prompt": shot.prompt, "pictures": [data_url(picture) for picture in chosen]})
    return shots


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    if height <= _PICTURE_HEIGHT:
        return picture
    size = (round(width * _PICTURE_HEIGHT / height), _PICTURE_HEIGHT)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def side_by_side(boards: Sequence[Sequence[Board]]) -> list[list[tuple[dict[str, Any] | None, ...]]]:
    """Returns the first film of each name, shot by shot, then the second of each, and so on; None past a film's end."""
    stories = zip_longest(*boards, fillvalue=[])
    return [list(zip_longest(*films)) for films in stories]
