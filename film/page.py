"""This module writes the page of a film: one HTML file in its folder, to be opened from disk.

The film, thumbnails, prompts and where routes go are in the file, but for a film of more than 32 MiB; the page links to
the videos, storyboards and metadata beside it. It asks no network for anything. Texts of the script are escaped.
"""

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from torch import Tensor

from data.records import write_whole
from film.estimate import in_bytes, in_flops
from film.folder import FilmFolder
from film.plan import FilmPlan
from moc.counts import count_of

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.globals["count_of"] = count_of
_MOST_TOLD = 3  # the most shots that a shot is said to look back to
_MOST_WITHIN = 32 << 20  # bytes; a longer film is linked and not put into the page


def write_page(path: Path, folder: FilmFolder, plan: FilmPlan, still: Callable[[int], np.ndarray]) -> None:
    """Writes the page of a whole film. still: a picture of each shot, uint8 [H, W, 3], by its number from 1."""
    record, counts = folder.read_metadata(), _counts_of_shots(folder.read_routing(), plan.filmed)
    shots = _shots(plan, record, counts)
    for shot in shots:
        shot["still"] = data_url(still(shot["number"]))
    html = _TEMPLATES.get_template("page.html.j2").render(
        script=plan.script,
        film=_film(folder.path / "video.mp4"),
        shots=shots,
        times=[{name: shot[name] for name in ("start", "prompt")} for shot in shots],
        redone=record["redone"],
        seconds=sum(plan.num_frames) / plan.script.fps,
        facts=_facts(record),
        routing=_packed(counts),
        storyboards=sorted((file.name for file in folder.path.glob("storyboard*.png")), key=_numbered),
    )
    write_whole(path, html.encode(errors="replace"))


def _numbered(name: str) -> tuple[int, str]:
    """Puts storyboard_10.png after storyboard_2.png."""
    return len(name), name


def _shots(plan: FilmPlan, record: dict[str, Any], counts: Tensor) -> list[dict[str, Any]]:
    """Returns what the page says of each shot."""
    fps, start = plan.script.fps, 0
    routes = counts.sum((0, 1))
    shares = (routes / routes.sum(1, keepdim=True).clamp(min=1e-12))[:, :-1]
    shots = []
    for number, (shot, frames) in enumerate(zip(plan.script.shots, plan.num_frames, strict=True), start=1):
        row = shares[number - 1]
        most = [index for index in row.argsort(descending=True).tolist() if row[index] >= 0.005][:_MOST_TOLD]
        shots.append(
            {
                "number": number,
                "prompt": shot.prompt,
                "cut": shot.begins_anew,
                "beginning": shot.beginning,
                "start": start / fps,
                "seconds": frames / fps,
                "frames": frames,
                "seed": None if shot.video else record["script"]["shots"][number - 1]["seed"],
                "tokens": record["estimate"]["shot_tokens"][plan.filmed[number - 1]],
                "looks_to": [(index + 1, round(100 * float(row[index]))) for index in most],
                "redone": number in record["redone"],
            }
        )
        start += frames
    return shots


def _facts(record: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Returns the tables below the film, by their heading: what it cost, how it was sampled and with what."""
    cost, sampler = record["estimate"], record["sampler"]
    saving = cost["dense_flops"] / max(cost["flops"], 1)
    seeds = sorted({shot["seed"] for shot in record["script"]["shots"] if "video" not in shot})
    return {
        "Cost": {
            "tokens": f"{sum(cost['shot_tokens']):,}",
            "sparsity of attention": f"{cost['sparsity']:.0%} at the last step",
            "forwards": f"{cost['forwards']:,}",
            "operations": in_flops(cost["flops"]),
            "with dense attention": f"{in_flops(cost['dense_flops'])} ({saving:.1f}x)",
            "memory, estimated": in_bytes(cost["memory"]),
            "device": record["device"],
        },
        "Sampling": {
            "steps": str(sampler["steps"]),
            "guidance scale": str(sampler["guidance_scale"]),
            "order": _order(sampler["lag"]),
            "noise shift": str(record["flow"].get("shift", "")),
            "attention": _attention(record["moc"]),
            "precision": record["precision"].removeprefix("torch."),
            "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
        },
        "Made with": {
            "checkpoint": record["checkpoint"],
            **{f"fingerprint, {name}": value for name, value in record["fingerprints"].items()},
            **record["versions"],
        },
    }


def _order(lag: float) -> str:
    """Returns in words which shots are sampled at a time (`SamplingConfig.lag`)."""
    if lag in (0, 1):
        return "one shot after another" if lag else "all shots at once"
    return f"each shot begins {lag:.0%} of its steps after the one before it"


def _attention(moc: dict[str, Any]) -> str:
    """Returns in words what a token attends to (`MoCConfig.to_dict`)."""
    if moc["dense"]:
        return "dense: each token attends to all others"
    where = "earlier in the film" if moc["causal"] else "anywhere in the film"
    chunks = f"{count_of(moc['top_k'], 'chunk')} of about {count_of(moc['chunk_tokens'], 'token')}"
    return f"Mixture of Contexts: each token chooses {chunks}, {where}"


def _counts_of_shots(counts: Tensor, filmed: list[int]) -> Tensor:
    """Returns the counts of the rows of filmed shots, float64 [layers, levels, S, S + 1]. The last column counts what
    went to pictures, which are not filmed."""
    rows = counts[:, :, filmed].double()
    others = rows.sum(-1, keepdim=True) - rows[..., filmed].sum(-1, keepdim=True)
    return torch.cat([rows[..., filmed], others], -1)


def _packed(counts: Tensor) -> dict[str, Any]:
    """Counts for the page's script: sizes, and uint16 in proportion, little-endian, as base64."""
    layers, levels, shots, _ = counts.shape
    scaled = (counts * (65535 / max(float(counts.max()), 1e-12) if counts.numel() else 1)).round()
    data = base64.b64encode(scaled.numpy().astype("<u2").tobytes()).decode()
    return {"layers": layers, "levels": levels, "shots": shots, "counts": data}


def _film(video: Path) -> str:
    """Returns the film as the page holds it, or where it lies beside the page."""
    return video.name if video.stat().st_size > _MOST_WITHIN else _data_url("video/mp4", video.read_bytes())


def data_url(picture: np.ndarray) -> str:
    """Returns a picture, uint8 [H, W, 3], as a page holds it: JPEG in a URL."""
    file = BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=82)
    return _data_url("image/jpeg", file.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
