"""This module writes a run's checkpoints: every process its own rows, in the foreground, or in a thread while training
goes on."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moc.config import MoCConfig
from moc.training import checkpoint as ckpt
from moc.training.interruption import launcher_patience
from moc.training.parallel import Parallel
from moc.training.storage import on_host, write_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot is a run after `step` steps.

    models: tensors by the names of their files, of "model" and "ema". optimizer: as `optimizer_states` names them.
    state: what state.json holds. moc: attention as it then is. rng: the random states of this process.
    """

    step: int
    models: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    moc: MoCConfig
    rng: dict[str, Tensor] = field(default_factory=ckpt.rng_states)

    def on_host(self) -> "Snapshot":
        """Returns a copy that later steps leave as it is."""
        models = {name: on_host(tensors) for name, tensors in self.models.items()}
        return replace(self, models=models, optimizer=on_host(self.optimizer))


class Saver:
    """A saver writes snapshots of a run as its checkpoints, one at a time; every process takes part in each.

    model: a diffusers model like the run's, with no values. keep, keep_every: see `remove_old`. in_background: return
    as soon as a snapshot is copied to the host's memory. save_extras(folder): adds what sampling needs.
    """

    def __init__(
        self,
        parallel: Parallel,
        run_folder: Path,
        model: Any,
        keep: int,
        keep_every: int,
        in_background: bool,
        save_extras: Callable[[Path], None],
    ) -> None:
        self.parallel, self.run_folder, self.model, self.save_extras = parallel, run_folder, model, save_extras
        self.keep, self.keep_every, self.in_background = keep, keep_every, in_background
        self.saved_step = 0  # the step of the newest checkpoint
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._warned = False  # whether it has warned that the launcher kills too early

    def save(self, snapshot: Snapshot, last: bool = False) -> None:
        """Writes a checkpoint. A full disk costs it and no more, with a warning, unless it is the run's last: that one
        is written in the foreground, and raises DiskError on all processes."""
        self.join()
        if last:
            self._write(snapshot)
        elif self.in_background:
            # It is a daemon, so that a process that fails meanwhile ends, and with it the job.
            self._thread = threading.Thread(target=self._note_failure, args=(snapshot.on_host(),), daemon=True)
            self._thread.start()
        else:
            self._write_or_go_on(snapshot)

    def join(self) -> None:
        """Returns when nothing is being written any more; raises what failed meanwhile."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            raise self._failure

    def _note_failure(self, snapshot: Snapshot) -> None:
        try:
            self._write_or_go_on(snapshot)
        except BaseException as error:
            self._failure = error

    def _write_or_go_on(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except ckpt.DiskError as error:
            if self.parallel.is_main:
                logger.warning("%s; the run goes on: make room before the next one", error.problem)

    def _write(self, snapshot: Snapshot) -> None:
        group, start = self.parallel.file_group, time.monotonic()
        with ckpt.new_checkpoint(self.run_folder, snapshot.step, self.parallel) as folder:
            with self.parallel.together():
                if self.parallel.is_main:
                    self._write_small_files(folder, snapshot)
            for name, tensors in snapshot.models.items():
                write_tensors(folder / name, tensors, self.model.weights_stem, group)
            write_tensors(folder, snapshot.optimizer, "optimizer", group)
        if self.parallel.is_main:
            ckpt.remove_old(self.run_folder, self.keep, self.keep_every)
            self._compare_with_launcher(time.monotonic() - start)
        self.saved_step = snapshot.step

    def _compare_with_launcher(self, seconds: float) -> None:
        """Warns once where a save may take longer than the launcher waits after a signal: of a step and a save."""
        patience = launcher_patience()
        if patience is not None and seconds > patience / 2 and not self._warned:
            self._warned = True
            logger.warning(
                "a save took %.0f s, and the launcher kills processes %.0f s after a signal: steps since the newest "
                "checkpoint may then be lost; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=%.0f (torch 2.12 and later), or start "
                "with scripts/launch/torchrun.sh, which waits",
                seconds, patience, 10 * seconds,
            )  # fmt: skip

    def _write_small_files(self, folder: Path, snapshot: Snapshot) -> None:
        for name in snapshot.models:
            (folder / name).mkdir()
            self.model.save_settings(folder / name)
            snapshot.moc.save(folder / name)
        ckpt.save_rng(folder, snapshot.rng, 0)
        ckpt.write_state(folder, snapshot.state)
        self.save_extras(folder)
