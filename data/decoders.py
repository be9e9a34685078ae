"""The decoders behind `open_video`, by name. One interface; tests hold all of them to the same exact frames."""

from pathlib import Path

from data.errors import DataError
from data.video import PyAVReader, VideoIndex, VideoReader

DECODERS = ("pyav",)


def build_reader(path: Path, decoder: str, index: VideoIndex | None) -> VideoReader:
    """Raises DataError (unknown-decoder)."""
    if decoder == "pyav":
        return PyAVReader(path, index)
    raise DataError("unknown-decoder", decoder, f"decoders are {', '.join(DECODERS)}")
