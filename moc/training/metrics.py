"""Metrics of a run: one JSON line each in `metrics.jsonl`, always; Weights & Biases besides, if asked for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc.errors import UserError
from moc.files import write_whole
from moc.training.checkpoint import refuse_later

TRACKERS = ("none", "wandb", "wandb-offline")


@dataclass(frozen=True)
class TrackerConfig:
    """tracker: none (the file alone), wandb, or wandb-offline (to be synchronized later; needs no account)."""

    tracker: str = "none"
    project: str = "moc"

    def __post_init__(self) -> None:
        if self.tracker not in TRACKERS:
            raise UserError(f"tracking.tracker={self.tracker!r} is not one of {', '.join(TRACKERS)}")


class Metrics:
    """Appends to `metrics.jsonl` in a run's folder; a resumed run drops the lines past its checkpoint first.

    Raises UserError where the folder holds checkpoints past `first_step`, before it drops anything, and where Weights &
    Biases does not start.
    """

    def __init__(self, folder: Path, config: TrackerConfig, run_config: dict[str, Any], first_step: int = 0) -> None:
        refuse_later(folder, first_step)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= first_step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode(), durable=True)
        self._wandb = None
        if config.tracker != "none":
            self._wandb = _start_wandb(folder, config, run_config)

    def log(self, step: int, values: dict[str, Any]) -> None:
        row = {"step": step, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._wandb:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._wandb:
            self._wandb.finish()


def _start_wandb(folder: Path, config: TrackerConfig, run_config: dict[str, Any]) -> Any:
    import wandb

    try:
        return wandb.init(
            project=config.project,
            name=folder.name,
            dir=folder,
            config=run_config,
            mode="offline" if config.tracker == "wandb-offline" else "online",
            resume="allow",
        )
    except wandb.Error as error:  # such as no key, or no network
        raise UserError(
            f"tracking.tracker={config.tracker}: Weights & Biases does not start ({error}); mend that, or say "
            "tracking.tracker=wandb-offline and synchronize the run later"
        ) from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics; a last line cut off by a crash is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def headline(values: dict[str, Any]) -> dict[str, str]:
    """What the progress line says of a logged step."""
    shown = {
        "loss": f"{values['loss']:.4f}" if "loss" in values else "not finite",
        "tokens/s": f"{values['tokens_per_second']:,.0f}",
    }
    return shown | ({"MFU": f"{values['mfu']:.0%}"} if "mfu" in values else {})
