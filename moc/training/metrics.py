"""Metrics of a run are always JSON lines in `metrics.jsonl`; Weights & Biases or TensorBoard get them too if asked
for."""

import errno
import json
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from moc.errors import UserError
from moc.files import write_whole
from moc.training.checkpoint import refuse_later

logger = logging.getLogger(__name__)
TRACKERS = ("none", "wandb", "wandb-offline", "tensorboard")


@dataclass(frozen=True)
class TrackerConfig:
    """These settings say where metrics go besides their file. tracker: none (the file alone), wandb, wandb-offline (to
    be synchronized later; needs no account), or tensorboard. project: of Weights & Biases."""

    tracker: str = "none"
    project: str = "moc"

    def __post_init__(self) -> None:
        if self.tracker not in TRACKERS:
            raise UserError(f"tracking.tracker={self.tracker!r} is not one of {', '.join(TRACKERS)}")


class Metrics:
    """This object appends to `metrics.jsonl` in a run's folder; a resumed run drops the lines past its checkpoint
    first.

    Raises UserError where the folder holds checkpoints past `first_step`, before it drops anything, and where a tracker
    does not start.
    """

    def __init__(self, folder: Path, config: TrackerConfig, run_config: dict[str, Any], first_step: int = 0) -> None:
        refuse_later(folder, first_step)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= first_step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode(), durable=True)
        self._tracker: Tracker | None = None
        if config.tracker == "tensorboard":
            self._tracker = TensorBoard(folder, first_step)
        elif config.tracker != "none":
            self._tracker = WeightsAndBiases(folder, config, run_config)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._write(json.dumps({"step": step, **values}) + "\n")
        self._track(lambda tracker: tracker.log(step, values))

    def _write(self, line: str) -> None:
        """Appends the line whole or, on a full disk, not at all, which costs the run no more."""
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line.encode()) < len(line.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                file.truncate(size)
                logger.warning("%s does not take a line: %s; the run goes on", self.path, error.strerror)

    def close(self) -> None:
        self._track(lambda tracker: tracker.close())

    def _track(self, tell: Callable[["Tracker"], None]) -> None:
        """Tells the tracker, if there is one. A full disk, which ends its thread, costs the tracker and not the run."""
        try:
            if self._tracker:
                tell(self._tracker)
        except OSError as error:
            self._tracker = None
            logger.warning("the tracker takes no more numbers: %s; the run goes on without it", error.strerror)


class Tracker(Protocol):
    """A tracker takes the metrics elsewhere, besides the file."""

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class WeightsAndBiases:
    """This tracker makes one run there for one folder, however often it is resumed: its id is kept in the folder."""

    def __init__(self, folder: Path, config: TrackerConfig, run_config: dict[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_whole(id_file, uuid.uuid4().hex.encode())
        try:
            self._run = wandb.init(
                id=id_file.read_text(),
                project=config.project,
                name=folder.name,
                dir=folder,
                config=run_config,
                mode="offline" if config.tracker == "wandb-offline" else "online",
                resume="allow",
                allow_val_change=True,
            )
        except wandb.Error as error:  # comes where there is no key or no network
            raise UserError(
                f"tracking.tracker={config.tracker}: Weights & Biases does not start ({error}); mend that, or say "
                "tracking.tracker=wandb-offline and synchronize the run later"
            ) from None
        # We give a step of our own, since theirs refuses the steps that a killed run does again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """This tracker writes event files in the run's folder; a resumed run replaces the steps past its checkpoint."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tracking.tracker=tensorboard needs a package that is not installed: pip install tensorboard"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics. A last line that a crash cut off is left out, and so is a line that is no
    row, as a power failure leaves, with a warning."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate((line for line in file if line.endswith("\n")), start=1):
            try:
                rows.append(_row(line))
            except ValueError:
                _tell_damaged(path, number)
    return rows


def _row(line: str) -> dict[str, Any]:
    """Returns the row that a line holds; raises ValueError where it holds none."""
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("a row is an object with a step")
    return row


@cache
def _tell_damaged(path: Path, number: int) -> None:
    logger.warning("%s:%d is not as it was written, and is left out", path, number)


def headline(values: dict[str, Any]) -> dict[str, str]:
    """Returns what the progress line says of a logged step."""
    shown = {
        "loss": f"{values['loss']:.4f}" if "loss" in values else "not finite",
        "tokens/s": f"{values['tokens_per_second']:,.0f}",
    }
    return shown | ({"MFU": f"{values['mfu']:.0%}"} if "mfu" in values else {})
