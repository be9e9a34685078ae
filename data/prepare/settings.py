"""This module defines the settings of preparing (data/prepare/pipeline.py)."""

from dataclasses import dataclass, field
from pathlib import Path

from data.media.decode import DECODERS
from data.media.index import MAX_SIDE
from data.prepare.shots import DETECTORS
from moc.errors import UserError, check_above_zero, check_least

DTYPES = ("float16", "bfloat16", "float32")


@dataclass
class PrepareConfig:
    """These settings say what to prepare and how.

    input: a folder of videos and images, or one with a manifest.jsonl.
    output: the folder to write, which training reads.
    size: height and width.
    buckets: more sizes; each file takes the nearest aspect.
    fps: the frame rate; null is each video's own.
    min_frames: shots shorter than this, at the set rate, are skipped.
    max_frames: longer shots are cut into continuations.
    shots_per_sample: the most that a sample has.
    decoder: what reads videos.
    detector: what finds shots.
    threshold: that of the detector; null is its own.
    online: no latents are stored; training reads the videos and encodes.
    captioner: a folder with a vision-language model, to caption what has no caption; null captions nothing.
    dtype: that of stored latents and text.
    shard_megabytes: the size of a file of the cache.
    strict: stop at the first bad file.
    """

    input: str
    output: str
    size: list[int] = field(default_factory=lambda: [480, 832])
    buckets: list[list[int]] = field(default_factory=list)
    fps: float | None = None
    min_frames: int = 5
    max_frames: int = 241
    shots_per_sample: int = 8
    decoder: str = "pyav"
    detector: str = "transnetv2"
    threshold: float | None = None
    online: bool = False
    captioner: str | None = None
    dtype: str = "float16"
    shard_megabytes: int = 256
    strict: bool = False

    def __post_init__(self) -> None:
        if Path(self.input).resolve() == Path(self.output).resolve():
            raise UserError(
                f"output={self.output} is the input; its manifest would be overwritten, name another folder"
            )
        if "://" in self.output:
            raise UserError(f"output={self.output} is a URL: prepare into a local folder, then copy its cache/ there")
        for size in [self.size, *self.buckets]:
            if len(size) != 2 or min(size) < 1 or max(size) > MAX_SIDE:
                raise UserError(f"a size is [height, width] in pixels, at most {MAX_SIDE} each, got {size}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise UserError(f"need 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}")
        check_above_zero(self, "", "fps", null="each video's own")
        check_above_zero(self, "", "threshold", null="the detector's own")
        if self.detector == "transnetv2" and (self.threshold or 0) >= 1:
            raise UserError(f"threshold={self.threshold} is of probabilities with transnetv2; name one below 1")
        check_least(self, "", 1, "shots_per_sample", "shard_megabytes")
        for name, known in (("decoder", DECODERS), ("detector", DETECTORS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple((size[0], size[1]) for size in [self.size, *self.buckets])
