"""This module reports what preparing took, cut and skipped and why, as JSON and as a page to look the data over."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.manifest import captions
from data.prepare.planning import SamplePlan
from data.prepare.scan import Scan
from data.records import digest, write_whole

REPORT_JSON, REPORT_HTML, THUMBNAILS = "report.json", "report.html", "thumbnails"
_THUMBNAIL_HEIGHT = 96
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass
class Report:
    """The report collects what the stages of preparing find. problems: kind, where, message and action ("skipped",
    "warning", "made again"). seconds, frames: what each stage took: scanning in all runs, encoding in this one."""

    samples: list[dict] = field(default_factory=list)
    problems: list[dict] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)

    def add_problem(self, error: DataError, action: str = "skipped") -> None:
        self.problems.append({"kind": error.kind, "where": error.where, "message": error.message, "action": action})

    def count(self, stage: str, frames: int, seconds: float = 0.0) -> None:
        """Notes how many frames, and seconds, a stage took."""
        self.frames[stage] = self.frames.get(stage, 0) + frames
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def count_scan(self, scan: Scan) -> None:
        if scan.index:
            self.count("decode", scan.index.num_frames, scan.decode_seconds)
            if scan.spans is not None:
                self.count("shot detection", scan.index.num_frames, scan.detect_seconds)

    def add_sample(self, plan: SamplePlan) -> None:
        """Takes a sample into the list of what the cache holds."""
        shots = [
            {"start": shot.start, "end": shot.end, "cut": shot.cut, "frames": len(indices), "caption": shot.caption}
            for shot, indices in zip(plan.scene.shots, plan.indices, strict=False)
        ]
        self.samples.append(
            {
                "id": plan.scene.id,
                "file": plan.scene.path,
                "size": plan.size,
                "caption": plan.scene.caption,
                "shots": shots,
                "thumbnails": [thumbnail_name(plan, i) for i in range(len(plan.indices))],
            }
        )

    def counts(self) -> dict[str, int]:
        """Returns how many records of each kind of problem."""
        return dict(Counter(problem["kind"] for problem in self.problems))

    def told(self) -> list[str]:
        """Returns a line for each kind of problem: how many there are, and what the first one is."""
        firsts = {problem["kind"]: problem for problem in reversed(self.problems)}
        return [
            f"{count} {kind}{', the first' * (count > 1)}: {firsts[kind]['where']}: {firsts[kind]['message']}"
            for kind, count in self.counts().items()
        ]

    def speed(self) -> dict[str, float]:
        """Returns frames a second of each stage that took time."""
        return {
            stage: round(self.frames[stage] / seconds, 1)
            for stage, seconds in self.seconds.items()
            if seconds > 0 and self.frames.get(stage)
        }

    def write(self, output: Path) -> None:
        """Writes report.json and report.html in the output folder."""
        summary = {
            "samples": len(self.samples),
            "shots": sum(len(sample["thumbnails"]) for sample in self.samples),
            "frames": {"decoded": self.frames.get("decode", 0), "taken": self._frames_taken()},
            "problems": self.counts(),
            "frames_per_second": self.speed(),
        }
        write_whole(output / REPORT_JSON, json.dumps({"summary": summary} | asdict(self), indent=1).encode())
        page = _TEMPLATES.get_template("report.html.j2").render(
            summary=summary, problems=self.problems, samples=self.samples, captions=captions, folder=THUMBNAILS
        )
        write_whole(output / REPORT_HTML, page.encode(errors="replace"))

    def _frames_taken(self) -> int:
        return sum(shot["frames"] for sample in self.samples for shot in sample["shots"])


def thumbnail_name(plan: SamplePlan, shot: int) -> str:
    """Returns the file name of a shot's picture; plans of the same content have the same."""
    return f"{digest({'key': plan.key, 'shot': shot})}.jpg"


def save_thumbnail(output: Path, plan: SamplePlan, shot: int, frame: Tensor) -> None:
    """Writes a fitted frame of a shot, float [3, H, W] in [-1, 1], as trained on."""
    array = ((frame.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
    image = Image.fromarray(array)
    image.thumbnail((4 * _THUMBNAIL_HEIGHT, _THUMBNAIL_HEIGHT))
    encoded = BytesIO()
    image.save(encoded, format="JPEG", quality=85)
    write_whole(output / THUMBNAILS / thumbnail_name(plan, shot), encoded.getvalue())
