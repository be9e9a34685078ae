"""This module is the first stage of preparing: it decodes each video once and records its exact frames and shots."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import av
from tqdm import tqdm

from data.errors import DataError
from data.media.index import VideoIndex, estimated_frames, index_video
from data.prepare.shots import ShotDetector, Span
from data.records import digest, read_record, write_record

_VERSION = 2  # the version of what a scan finds; records of another version are made anew


@dataclass(frozen=True)
class Scan:
    """A scan is what is known of one video.

    That is the index, the shots if they were looked for, the fault that ended the scan, the number of frames that the
    header claims (None: no claim), and the seconds that decoding and shot detection took.
    """

    index: VideoIndex | None
    spans: tuple[Span, ...] | None
    error: DataError | None
    claimed_frames: int | None = None
    decode_seconds: float = 0.0
    detect_seconds: float = 0.0


def scan_video(root: Path, relative: str, folder: Path, detector: ShotDetector | None, progress: bool = False) -> Scan:
    """Returns the scan of a video, from `folder` if one was made of this very file with this detector (None: no
    shots)."""
    stat = (root / relative).stat()
    made_of = {
        "video": relative,
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "detector": detector.name if detector else "",
        "version": _VERSION,
    }
    record = folder / f"{digest(made_of)}.json"
    fields = read_record(record)
    if fields is not None:
        return _from_json(fields)
    result = _scan_now(root / relative, detector, progress)
    write_record(record, _to_json(result))
    return result


def _scan_now(path: Path, detector: ShotDetector | None, progress: bool) -> Scan:
    finder = detector.finder() if detector else None
    watch = _Stopwatch()
    bar = tqdm(desc=path.name[-24:], total=estimated_frames(path), unit="frame", leave=False, disable=not progress)

    def see(frame: av.VideoFrame) -> None:
        bar.update()
        if finder:
            with watch:
                finder.see(frame)

    start = time.perf_counter()
    try:
        index = index_video(path, see)
    except DataError as error:
        return Scan(None, None, error)
    finally:
        bar.close()
    decode_seconds = time.perf_counter() - start - watch.seconds
    spans = None
    if finder:
        with watch:
            spans = tuple(finder.spans())
    return Scan(index, spans, None, estimated_frames(path, index.fps), decode_seconds, watch.seconds)


class _Stopwatch:
    """A stopwatch adds up the seconds spent inside `with`."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def _to_json(result: Scan) -> dict:
    return {
        "index": asdict(result.index) if result.index else None,
        "spans": result.spans,
        "error": [result.error.kind, result.error.where, result.error.message] if result.error else None,
        "claimed_frames": result.claimed_frames,
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
        fields["claimed_frames"],
        *fields["seconds"],
    )
