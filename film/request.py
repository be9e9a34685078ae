"""A film's request is a JSON object of all that decides its frames. This module compares two of them."""

import json
from typing import Any

REQUEST = ("script", "moc", "flow", "sampler", "precision", "fingerprints")  # metadata that decide the frames


def shot_of(request: dict[str, Any], number: int) -> Any:
    """Returns what a request asks of a shot; None where its script has none of that number."""
    shots = request["script"]["shots"]
    return shots[number - 1] if number <= len(shots) else None


def other_shots(before: dict[str, Any], now: dict[str, Any]) -> list[int]:
    """Returns the numbers of the shots, counted from 1, in which two requests differ; none where they differ in more,
    in all of their shots, or in a given video."""
    old, new = before["script"]["shots"], now["script"]["shots"]
    rest = [request | {"script": request["script"] | {"shots": []}} for request in (before, now)]
    other = [number for number, pair in enumerate(zip(old, new, strict=False), start=1) if pair[0] != pair[1]]
    given = any("video" in shots[number - 1] for shots in (old, new) for number in other)
    if given or len(old) != len(new) or len(other) == len(old) or rest[0] != rest[1]:
        return []
    return other


def difference(before: Any, now: Any, key: str = "") -> str:
    """Returns the first value in which two JSON objects differ, in words; "" where they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            said = difference(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
            if said:
                return said
        return ""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return next(filter(None, (difference(*pair, f"{key}[{index}]") for index, pair in pairs)), "")
    return "" if before == now else f"its {key} is {_short(before)}, not {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
