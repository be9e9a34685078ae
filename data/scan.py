"""First stage of preparing: decode each video once, for its exact frames and its shots, and remember both."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data.cache import digest, write_whole
from data.errors import DataError
from data.shots import Span, build_finder
from data.video import VideoIndex, scan


@dataclass(frozen=True)
class Scan:
    """Of one video: its index, its shots if they were looked for, the fault that ended the scan, and the seconds
    that decoding and shot detection took."""

    index: VideoIndex | None
    spans: tuple[Span, ...] | None
    error: DataError | None
    decode_seconds: float = 0.0
    detect_seconds: float = 0.0


def scan_video(root: Path, relative: str, folder: Path, detector: str, threshold: float, device: str) -> Scan:
    """The scan of a video, from `folder` if one was made of this very file with this detector ("": no shots)."""
    stat = (root / relative).stat()
    made_of = {
        "video": relative,
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "detector": detector and f"{detector} {threshold}",
    }
    record = folder / f"{digest(made_of)}.json"
    if record.is_file():
        return _from_json(json.loads(record.read_text()))
    result = _scan_now(root / relative, detector, threshold, device)
    write_whole(record, json.dumps(_to_json(result)).encode())
    return result


def _scan_now(path: Path, detector: str, threshold: float, device: str) -> Scan:
    finder = build_finder(detector, threshold, device) if detector else None
    start = time.perf_counter()
    try:
        index = scan(path, finder.see if finder else None)
    except DataError as error:
        return Scan(None, None, error)
    decoded = time.perf_counter()
    spans = tuple(finder.spans()) if finder else None
    return Scan(index, spans, None, decoded - start, time.perf_counter() - decoded)


def _to_json(result: Scan) -> dict:
    return {
        "index": asdict(result.index) if result.index else None,
        "spans": result.spans,
        "error": [result.error.kind, result.error.where, result.error.message] if result.error else None,
        "seconds": [result.decode_seconds, result.detect_seconds],
    }


def _from_json(fields: dict) -> Scan:
    index = fields["index"]
    if index:
        index["times"] = tuple(index["times"])
        index["pts"] = tuple(index["pts"]) if index["pts"] is not None else None
    return Scan(
        VideoIndex(**index) if index else None,
        tuple((start, end) for start, end in fields["spans"]) if fields["spans"] is not None else None,
        DataError(*fields["error"]) if fields["error"] else None,
        *fields["seconds"],
    )
