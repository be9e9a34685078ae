"""The training loop has steps of micro-batches, an optimizer, averaged weights, metrics, checkpoints and resuming.

One optimizer step minimizes the loss averaged over all shots of the global batch: all processes, all micro-batches.
Every random draw is keyed by the seed and the sample's position in the run (`Flow.draw_levels`, `DropKey`), so a run
on N processes equals a run on one, and a resumed run equals one that was never stopped.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moc import memory
from moc.batch import Batch
from moc.config import MoCConfig
from moc.diffusion.flow import Flow, NoiseLevels
from moc.errors import UserError, check_least
from moc.schedule import MoCSchedule
from moc.training import checkpoint as ckpt
from moc.training.clock import Clock
from moc.training.ema import EMA
from moc.training.group_numbers import GroupNumbers
from moc.training.interruption import GOES_ON, TRIAL_ENDED, Interruption
from moc.training.metrics import Metrics, headline
from moc.training.optim import OptimConfig, build_optimizer, freeze, learning_rate, set_learning_rate, take_step
from moc.training.outcome import Outcome, TooManySkipped, Totals, check_finite
from moc.training.parallel import Parallel
from moc.training.passes import Passes
from moc.training.saving import Saver, Snapshot
from moc.training.shards import hollow, whole
from moc.training.step_log import StepLog
from moc.training.survey import Survey
from moc.training.validation import Validator

# Draws a sample of a model with some attention at a step. The last argument is asked within, by all processes equally
# often, whether the run is to end.
DrawSamples = Callable[[Any, MoCConfig, int, Callable[[], bool]], None]

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """This interface gives the data of a run: it iterates over steps, endlessly, each a list of this process's
    micro-batches."""

    def __iter__(self) -> Any: ...

    def state(self) -> dict[str, Any]:
        """Returns where the data stands after the steps taken so far, JSON-ready."""
        ...


@dataclass(frozen=True)
class TrainerConfig:
    """These settings say how long a run is and how often it reports.

    num_steps: the number of optimizer steps of the run.
    log_every: how many steps lie between two lines of metrics.
    validate_every: how many steps lie between two validations; 0 is none but before the first step and after the last.
    checkpoint_every: how many steps lie between two checkpoints; 0 is none but after the last step.
    sample_every: how many steps lie between two samples of a held-out scene; 0 is never.
    keep_checkpoints: how many of the newest stay.
    keep_every: the checkpoints of every so many steps stay besides; 0 is none.
    save_in_background: go on as soon as a checkpoint is copied to the host's memory, which takes 16 bytes a parameter,
    divided by the processes that share them.
    ema_decay: the share of the moving average of the weights that each step keeps.
    max_skipped_steps: how many steps in a row may have no finite loss and gradient before the run ends.
    cuda_graphs: how many kinds of micro-batches, by their texts' and shots' lengths, keep a CUDA graph of forward and
        backward, which spares a small model the host's time; it takes about the memory of a step more. 0 is none.
    """

    num_steps: int = 20_000
    log_every: int = 10
    validate_every: int = 500
    sample_every: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    keep_every: int = 0
    save_in_background: bool = False
    ema_decay: float = 0.999
    max_skipped_steps: int = 10
    cuda_graphs: int = 0

    def __post_init__(self) -> None:
        check_least(self, "trainer", 1, "num_steps", "log_every", "keep_checkpoints")
        check_least(
            self, "trainer", 0, "validate_every", "sample_every", "checkpoint_every", "keep_every", "max_skipped_steps",
            "cuda_graphs",
        )  # fmt: skip
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"trainer.ema_decay={self.ema_decay} must lie in [0, 1)")


class Trainer:
    """A trainer trains `model`, a diffusers ModelMixin; see the module.

    `save_extras(folder)` adds to each checkpoint what sampling needs besides the model. A trial takes its steps and
    saves the last one: it neither validates nor samples, and saves nothing where it is told to end.
    """

    def __init__(
        self,
        parallel: Parallel,
        model: Any,
        flow: Flow,
        moc: MoCConfig,
        schedule: MoCSchedule,
        optim: OptimConfig,
        config: TrainerConfig,
        run_folder: Path,
        seed: int,
        save_extras: Callable[[Path], None],
        draw_samples: DrawSamples | None = None,
        is_trial: bool = False,
    ) -> None:
        self.parallel = parallel
        self.flow, self.moc, self.schedule = flow, moc, schedule
        self.optim, self.config, self.run_folder, self.seed = optim, config, run_folder, seed
        self.draw_samples, self.is_trial = draw_samples, is_trial
        freeze(model, optim.rates)
        self._saver = Saver(
            parallel,
            run_folder,
            hollow(model),
            config.keep_checkpoints,
            config.keep_every,
            config.save_in_background,
            save_extras,
        )
        self._clock = Clock(parallel.device)
        parallel.timed_by(self._clock.communication)
        self.bare_model, self.model = model, parallel.wrap(model)
        self.ema, self.optimizer = EMA(model, config.ema_decay), build_optimizer(model, optim)
        self._group_numbers = GroupNumbers(self.optimizer)
        self.step = 0
        self.step_log = StepLog(config.max_skipped_steps, parallel.is_main)
        self._survey: Survey | None = None  # the survey of the newest step, if it is a log_every-th
        self._pass = Passes(parallel, self.model, flow, seed, config.cuda_graphs)
        self._validation_due = True
        self._interruption = Interruption()

    def resume(self, checkpoint: Path) -> dict[str, Any]:
        """Continues from a checkpoint: loads weights, averages, optimizer, step and random states.

        checkpoint: a folder `step_NNNNNNN` of a run with the same seed and the same model.
        Returns the state of the data, as `Steps.state` gave it. Raises UserError where seed or model differ.
        """
        state = ckpt.read_run_state(checkpoint)
        if state["seed"] != self.seed:
            raise UserError(f"{checkpoint} was trained with seed={state['seed']}, not {self.seed}: set seed to resume")
        ckpt.check_same_model(checkpoint / "model", self._saver.model)
        self.bare_model.load_weights(checkpoint / "model")
        with self.ema.applied():
            self.bare_model.load_weights(checkpoint / "ema")
        self.ema.restore(state["step"])
        ckpt.load_rng(checkpoint, self.parallel.rank)
        ckpt.load_optimizer(checkpoint, self.bare_model, self.optimizer)
        self._group_numbers.restore(state.get("optimizer", {"groups": [], "empty": []}))
        self.step = state["step"]
        self._saver.saved_step = self.step
        self.step_log.skips.total = state.get("skipped_steps", 0)
        self._validation_due = state.get("validation_due", False)
        return state["data"]

    def run(self, steps: Steps, metrics: Metrics | None, validator: Validator | None = None) -> bool:
        """Trains until `num_steps`; returns whether it came there.

        A signal to end, sent to any process, ends the run early, with a checkpoint of its last whole step. metrics:
        None on all processes but the main one. Raises FloatingPointError where too many steps in a row have no finite
        loss and gradient.
        """
        if self.step >= self.config.num_steps:
            return True
        if validator:
            validator.check(self.parallel)
        with (
            Interruption() as self._interruption,
            tqdm(
                total=self.config.num_steps, initial=self.step, desc="train", unit="step", disable=metrics is None
            ) as bar,
        ):
            try:
                finished = self._run(steps, metrics, None if self.is_trial else validator, bar)
            except FloatingPointError:  # is raised on all processes at once
                self._saver.join()
                raise
            if not finished:
                bar.close()
                self._leave(metrics)
        return finished

    def _run(self, steps: Steps, metrics: Metrics | None, validator: Validator | None, bar: tqdm) -> bool:
        source = iter(steps)
        self._data_state = steps.state()
        if validator and self._validation_due and not self._validate(validator, metrics):
            return False
        self.model.train()
        self._clock.reset()
        gc.freeze()  # a full collection over torch's own objects would stall a step by tens of milliseconds
        while self.step < self.config.num_steps:
            batches = self._clock.wait(lambda: self._interruption.wait(lambda: next(source)))
            with memory.enough_for(f"step {self.step + 1}", memory.STEP, batches or []), self.parallel.launching():
                if self._interrupted() or not self._train_step(batches or []):
                    return False
            self._data_state = steps.state()
            bar.update()
            if not self._after_step(metrics, validator, bar):
                return False
        return True

    def _after_step(self, metrics: Metrics | None, validator: Validator | None, bar: tqdm) -> bool:
        """Looks, logs, validates, saves and samples where they are due; returns whether training goes on."""
        last = self.step == self.config.num_steps
        saves = last or _due(self.step, self.config.checkpoint_every)
        if saves or _due(self.step, self.config.log_every):
            totals = self._look(metrics)
            if saves and not self.step_log.proven:
                remedy = "lower optim.lr or resume from an earlier checkpoint"
                raise FloatingPointError(f"the loss is {totals.loss} at step {self.step}; {remedy}")
            values = self._summary(totals)
            bar.set_postfix(headline(values))
            if metrics:
                metrics.log(self.step, values)
        else:
            self._look(metrics, but=1)
        self._validation_due |= last or _due(self.step, self.config.validate_every)
        validated = not (validator and self._validation_due) or self._validate(validator, metrics)
        if saves:
            self.save(self._data_state, last)
        if not validated and not last:
            return False
        samples = self.draw_samples and not self.is_trial and _due(self.step, self.config.sample_every)
        if samples:
            self._draw_samples()
        if saves or validator or samples:
            self._clock.reset()
        return not (self.is_trial and self._interrupted())

    def _interrupted(self) -> bool:
        """Returns whether any process was told to end; all processes ask at the same points."""
        return self.parallel.any(bool(self._interruption.signal))

    def _leave(self, metrics: Metrics | None) -> None:
        """Saves what no checkpoint holds yet, but for a trial, and says so."""
        self.optimizer.zero_grad()  # drops the gradients of an unfinished step
        self._look(metrics)
        self._saver.join()
        if self.is_trial:
            told = TRIAL_ENDED
        elif not self.step_log.proven:
            told = "the weights give no finite loss and are not saved; the same command goes on"
        elif self.step > self._saver.saved_step:
            self.save(self._data_state, last=True)
            told = f"step {self.step} of {self.config.num_steps} is saved; the same command goes on"
        else:
            told = GOES_ON
        if self.parallel.is_main:
            logger.warning("%s: %s", self._interruption.signal or "another process was told to end", told)

    def _pass_over(self) -> None:
        """Saves where the data stands after skipped steps, so that a run which goes on does not meet them at once; but
        not if they never gave a finite loss, which may be the weights' fault."""
        if self.step_log.proven:
            self.save(self._data_state)
            self._saver.join()
        if self.parallel.is_main:
            saved = self._saver.saved_step == self.step  # false where the disk is full
            logger.warning("the same command %s", "goes on after these steps" if saved else "meets these steps again")

    def save(self, data_state: dict[str, Any], last: bool = False) -> None:
        """Saves a checkpoint of this step; every process takes part. last: see `Saver.save`."""
        check_finite(self.parallel, self.bare_model, self.ema, self.optimizer, self.step)
        state = {"step": self.step, "seed": self.seed, "data": data_state, "flow": asdict(self.flow)}
        state |= {"skipped_steps": self.step_log.skips.total, "validation_due": self._validation_due}
        state |= {"optimizer": self._group_numbers.state()}
        snapshot = Snapshot(
            self.step,
            self.saved_tensors(),
            ckpt.optimizer_states(self.bare_model, self.optimizer),
            state,
            self.schedule.at(self.step, self.moc),
        )
        self._saver.save(snapshot, last)

    def saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors of the two models in a checkpoint, by their names in its files."""
        weights, stored = self.bare_model.state_dict(), self._saver.model.stored
        return {"model": stored(weights), "ema": stored(weights | self.ema.averages)}

    def _train_step(self, batches: Sequence[Batch]) -> bool:
        """Takes one optimizer step; returns whether it was taken, rather than interrupted."""
        moc = self.schedule.at(self.step, self.moc)
        levels = [self.flow.draw_levels(batch, self.seed) for batch in batches]
        targets = self.parallel.put(torch.tensor(sum(int(level.is_target.sum()) for level in levels)))
        # Gradients are averaged over all processes; the loss is a mean over the targets of all of them.
        scale = self.parallel.world_size / self.parallel.sum(targets)
        self._survey = Survey(self.bare_model, moc) if _due(self.step + 1, self.config.log_every) else None
        losses = []
        for index, (batch, level) in enumerate(zip(batches, levels, strict=True)):
            batch = batch.rechunk(moc.chunk_tokens).to(self.parallel.device)
            if index and self._interrupted():
                return False
            with nullcontext() if index == len(batches) - 1 else self.parallel.keep_gradients(self.model):
                losses.append(self._pass(batch, level, scale, self.step, moc, self._survey, self._clock.begin))
        self._update(batches, levels, torch.cat(losses), scale)
        return True

    def _update(self, batches: Sequence[Batch], levels: list[NoiseLevels], by_shot: Tensor, scale: Tensor) -> None:
        """Changes the weights by the gradients of the step. They and the optimizer's moments stay as they are where the
        loss or the gradient is not finite.

        by_shot: fp32 [S], the losses of all shots of the batches. scale: of each in what is minimized, averaged over
        the processes.
        """
        self._clock.begin("optimizer")
        grad_norm = whole(nn.utils.clip_grad_norm_(self.ema.weights.values(), self.optim.clip_norm))
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config.num_steps, self.optim))
        loss_sum, num_finite = self.parallel.sum(torch.stack([by_shot.sum(), by_shot.isfinite().sum()])).unbind()
        totals = torch.stack([loss_sum * scale / self.parallel.world_size, grad_norm, num_finite])
        take_step(self.optimizer, totals.isfinite().all())
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)  # graphs add to gradients in place
        self.ema.update()
        self._clock.begin("")
        self.step += 1
        self.step_log.add(Outcome(self.step, batches, levels, by_shot, totals))

    def _look(self, metrics: Metrics | None, but: int = 0) -> Totals:
        """Reads outcomes as `StepLog.read` does; saves where the data stands before it raises TooManySkipped."""
        try:
            return self.step_log.read(metrics, but)
        except TooManySkipped:
            self._pass_over()
            raise

    def _summary(self, totals: Totals) -> dict[str, Any]:
        """Returns the values to log for a step; the loss is over the targets of all processes, which all take part."""
        moc, timing = self.schedule.at(self.step - 1, self.moc), self._clock.read()
        speed = timing["tokens_per_second"]
        survey = self._survey.read(speed, self.parallel.dtype) if self._survey else {}
        timing["tokens_per_second"] = float(self.parallel.sum(self.parallel.put(torch.tensor(speed))))
        settings = {
            "skipped_steps": self.step_log.skips.total,
            "lr": learning_rate(self.step - 1, self.config.num_steps, self.optim),
            "chunk_tokens": moc.chunk_tokens,
            "top_k": moc.top_k,
        }
        memory_peak = memory.peak_gib(self.parallel.device)
        return totals.finite() | settings | timing | memory_peak | self.step_log.breakdown.read() | survey

    def _validate(self, validator: Validator, metrics: Metrics | None) -> bool:
        """Logs the held-out loss of the averaged weights; returns whether it was finished, rather than interrupted.

        Each process takes its share of the scenes.
        """
        moc = self.schedule.at(self.step, self.moc)
        with (
            memory.enough_for("validation", memory.VALIDATION, validator.batches),
            self.ema.applied(),
        ):
            sums = validator.losses(self.bare_model, moc, self.parallel, self._interrupted)
            if self._interrupted():
                return False
            shown = metrics or self.parallel.is_sharded
            routing = validator.routing(self.bare_model, moc, self.parallel) if shown else {}
        sums = self.parallel.sum(sums)
        if metrics:
            mean = (sums[:, 0] / sums[:, 1]).tolist()
            values = {f"validation/loss_{sigma:g}": loss for sigma, loss in zip(validator.sigmas, mean, strict=True)}
            metrics.log(self.step, values | {f"routing/{key}": value for key, value in routing.items()})
        self._validation_due = False
        return True

    def _draw_samples(self) -> None:
        """Has the averaged weights sample; every process takes part."""
        assert self.draw_samples
        self.model.eval()
        with self.ema.applied(), self.parallel.autocast(), torch.no_grad():
            self.draw_samples(self.bare_model, self.schedule.at(self.step, self.moc), self.step, self._interrupted)
        self.model.train()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
