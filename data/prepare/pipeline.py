"""This module makes a cache to train on from a folder of videos: finds, scans, plans, captions, encodes, reports.

Every stage keeps what it finished, so that a run that was killed goes on, and a second run redoes nothing. Many
processes, on one host or many that share the folders, take turns over the items; they meet only between stages. One
bad file never stops a run (unless `strict`): it becomes a named record of the report.

    output/scans/*.json        what decoding each video found
    output/captions/*.json     what a captioner answered
    output/manifest.jsonl      the samples, paths relative to the input
    output/cache/<digest>/     latents and text (data/cache/writer.py)
    output/report.json, report.html, thumbnails/
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.cache.online import name_films
from data.cache.writer import CacheWriter, finish, read_stored, remove_damaged, whole_scenes
from data.earlier import PREPARE
from data.errors import DataError
from data.interfaces import Codec, TextEncoder
from data.manifest import write_manifest
from data.media.decode import check_decoder
from data.prepare.captioner import Captioner, SampleCaptioner, TransformersCaptioner
from data.prepare.encode import SampleEncoder
from data.prepare.planning import SamplePlan, ShotRule, doubts, plan_scene
from data.prepare.ranks import Process, held
from data.prepare.report import Report
from data.prepare.scan import Scan, scan_video
from data.prepare.settings import PrepareConfig
from data.prepare.shots import build_detector
from data.prepare.sources import MANIFEST, Found, find_scenes
from data.records import digest, read_record, write_record
from moc.files import PARTIAL

_LATE_SECONDS = 90  # a network file system may show a file to other hosts that much later


@dataclass(frozen=True)
class Prepared:
    """This is the result of preparing. cache: the folder to train on."""

    cache: Path
    manifest: Path
    report: Report


def prepare(
    config: PrepareConfig,
    codec: Codec,
    text_encoder: TextEncoder,
    process: Process | None = None,
    found: Found | None = None,
    save_encoders: Callable[[Path], None] | None = None,
    captioner: Captioner | None = None,
    device: str = "cpu",
) -> Prepared:
    """Runs all stages. found: what `find_scenes(config.input, config.output)` gave, if it was called before.
    save_encoders: called with cache/encoders before the cache counts as complete. captioner: instead of the one that
    config names. device: where detector, codec and captioner compute.

    Raises DataError: missing-input, empty-input, output-in-use, cannot-write, bad-size, bad-length, decoder-missing,
    no-usable-samples, lost-work, with `strict` the first problem of any file. The report is written before
    no-usable-samples is raised.
    """
    process = process or Process()
    output = Path(config.output)
    _check_sizes(config, codec)
    check_decoder(config.decoder)
    found = found or find_scenes(config.input, config.output)
    with held(output, process):
        if config.captioner and captioner is None:
            captioner = TransformersCaptioner(config.captioner, device)
        return _Run(config, codec, text_encoder, process, found, device).all_stages(captioner, save_encoders)


class _Run:
    """A run is the state of one call: the configuration, the found scenes and the report being filled."""

    def __init__(
        self,
        config: PrepareConfig,
        codec: Codec,
        text_encoder: TextEncoder,
        process: Process,
        found: Found,
        device: str,
    ) -> None:
        self.config, self.codec, self.text_encoder, self.device = config, codec, text_encoder, device
        self.process, self.found = process, found
        self.output = Path(config.output)
        self.rule = ShotRule(
            config.fps, config.min_frames, config.max_frames, config.shots_per_sample, codec, config.sizes
        )
        self.report = Report()
        self.failures: list[list[str]] = []  # kind, where, message and the key of a lost sample, of this process
        self.detector = build_detector(config.detector, config.threshold, device)
        self.recipe = {
            "decoder": config.decoder,
            "codec": codec.fingerprint,
            "text": text_encoder.fingerprint,
            "sizes": config.sizes,
            "fps": PREPARE.as_written("fps", config.fps),
            "dtype": config.dtype,
            "online": config.online,
        }
        self.cache = self.output / "cache" / digest(self.recipe)

    def all_stages(self, captioner: Captioner | None, save_encoders: Callable[[Path], None] | None) -> Prepared:
        """Runs scanning, planning, captions, encoding and the report, in this order; see `prepare`."""
        for problem in self.found.problems:
            self._problem(problem)
        for warning in self.found.warnings:
            self.report.add_problem(warning, action="warning")
        if self.process.rank == 0:
            for path in self.output.rglob(f".*{PARTIAL}"):  # a run that was killed left these
                path.unlink()
        self.process.wait()
        if self.process.rank == 0:
            self._check_earlier_work()
        self._scan_videos()
        self.process.wait()
        plans = self._plan()
        if captioner:
            plans = self._caption(plans, captioner)
        manifest = self.output / MANIFEST
        if self.process.rank == 0:
            write_manifest(manifest, [plan.scene for plan in plans])
        self._encode(plans)
        self.process.wait()
        if self.process.rank == 0:
            self._report(plans)
            if save_encoders:
                save_encoders(self.cache / "encoders")
            films = name_films(self.found.root, self.cache) if self.config.online else None
            finish(self.cache, self.recipe, [plan.key for plan in plans], films)
        self.process.wait()
        return Prepared(self.cache, manifest, self.report)

    def _problem(self, error: DataError) -> None:
        if self.config.strict:
            raise error
        self.report.add_problem(error)

    def _check_earlier_work(self) -> None:
        """Deletes damaged shards of an earlier run, and its notes of what failed."""
        for problem in remove_damaged(self.cache):
            self.report.add_problem(problem, action="made again")
        for path in self.cache.glob("failures-*.json"):
            path.unlink()

    def _scan(self, relative: str, detect: bool) -> Scan:
        detector = self.detector if detect else None
        return scan_video(self.found.root, relative, self.output / "scans", detector, self.process.rank == 0)

    def _videos(self) -> dict[str, bool]:
        """Returns each video, and whether any scene wants its shots found."""
        wanted: dict[str, bool] = {}
        for scene in self.found.scenes:
            if scene.video:
                wanted[scene.video] = wanted.get(scene.video, False) or not scene.shots
        return wanted

    def _scan_videos(self) -> None:
        items = {video: (video, detect) for video, detect in self._videos().items()}
        for relative, detect in self.process.share(items, "scan"):
            self._scan(relative, detect)

    def _plan(self) -> list[SamplePlan]:
        """Returns all samples, the same on every process."""
        videos = self._videos()
        plans: list[SamplePlan] = []
        ids: set[str] = set()
        scans = {video: self._scan(video, detect) for video, detect in videos.items()}
        for scan in scans.values():
            self.report.count_scan(scan)
        for scene in self.found.scenes:
            seen = scans[scene.video] if scene.video else None
            try:
                samples, skipped = plan_scene(self.found.root, scene, seen, self.rule)
            except DataError as error:
                self._problem(error)
                continue
            taken = sorted({plan.scene.id for plan in samples} & ids)
            if taken:
                said = f"another scene has a sample {taken[0]!r} already; give one of them another id"
                self._problem(DataError("duplicate-id", scene.where, said))
                continue
            for warning in doubts(scene, seen, self.rule.sizes):
                self.report.add_problem(warning, action="warning")
            for shot in skipped:
                self._problem(shot)
            plans += samples
            ids |= {plan.scene.id for plan in samples}
        return plans

    def _caption(self, plans: list[SamplePlan], captioner: Captioner) -> list[SamplePlan]:
        """Returns the plans, those without any caption with the model's."""
        captions = SampleCaptioner(captioner, self.found.root, self.output / "captions")
        wanted = {plan.key: plan for plan in plans if captions.wants(plan)}
        for plan in self.process.share(wanted, "caption", {key for key, plan in wanted.items() if captions.has(plan)}):
            try:
                captions.make(plan)
            except DataError as error:
                if self.config.strict:
                    raise
                self.failures.append([error.kind, error.where, error.message, ""])
        self.process.wait()
        self.report.problems = [p for p in self.report.problems if p["kind"] != "empty-caption"]
        return [captions.apply(plan) if captions.wants(plan) else plan for plan in plans]

    def _encode(self, plans: list[SamplePlan]) -> None:
        config, rank = self.config, self.process.rank
        writer = CacheWriter(
            self.cache,
            self.recipe,
            rank,
            self.process.world_size,
            getattr(torch, config.dtype),
            config.shard_megabytes << 20,
        )
        encoder = SampleEncoder(
            self.codec,
            self.text_encoder,
            self.found.root,
            self.output,
            config.decoder,
            self.device,
            self.cache if config.online else None,
        )
        self.process.wait()
        writer.adopt()
        encoder.add_null_text(writer)
        start = time.perf_counter()
        try:
            for plan in self.process.share({plan.key: plan for plan in plans}, "encode", writer.done):
                try:
                    writer.add(encoder.encode(plan))
                    self.report.count("encode", sum(len(indices) for indices in plan.indices))
                except DataError as error:
                    if config.strict or error.kind == "cannot-write":
                        raise
                    self.failures.append([error.kind, error.where, error.message, plan.key])
        finally:
            writer.flush()
        self.report.seconds["encode"] = time.perf_counter() - start
        write_record(self._failures(rank), self.failures)

    def _outcome(self, plans: list[SamplePlan]) -> set[str]:
        """Returns keys of the samples stored by all processes; reports those that failed. What other hosts wrote may
        show here late. Raises DataError (lost-work) where a sample is neither, so that no cache lacks one silently."""
        for _ in range(_LATE_SECONDS + 1):
            notes = [read_record(self._failures(rank)) for rank in range(self.process.world_size)]
            failures = [failure for note in notes if note is not None for failure in note]
            done = whole_scenes(read_stored(self.cache))
            settled = done | {key for *_, key in failures}
            lost = [plan.scene.id for plan in plans if plan.key not in settled]
            if not lost and None not in notes:
                for *fields, key in failures:  # one without a key got no captions, and is used
                    self.report.add_problem(DataError(*fields), action="skipped" if key else "warning")
                return done
            time.sleep(1)
        raise DataError(
            "lost-work",
            self.cache,
            f"no process stored {len(lost)} samples ({', '.join(lost[:3])} ...); do all hosts see the same output "
            "folder? Run again to make what is missing",
        )

    def _failures(self, rank: int) -> Path:
        return self.cache / f"failures-{rank}.json"

    def _report(self, plans: list[SamplePlan]) -> None:
        """Writes the report. Raises DataError (no-usable-samples, lost-work)."""
        done = self._outcome(plans)
        for plan in plans:
            if plan.key in done:
                self.report.add_sample(plan)
        self.report.write(self.output)
        if not self.report.samples:
            why = f"nothing usable ({'; '.join(self.report.told())}); see {self.output}/report.json"
            raise DataError("no-usable-samples", self.config.input, why)


def _check_sizes(config: PrepareConfig, codec: Codec) -> None:
    for height, width in config.sizes:
        if height % codec.spatial_factor or width % codec.spatial_factor:
            raise DataError(
                "bad-size", "size", f"{height}x{width} must be multiples of the codec's {codec.spatial_factor}"
            )
