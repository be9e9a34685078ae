"""Trains a multi-shot video model: `python train.py experiment=NAME key=value ...`, or with `accelerate launch`.

From here to the inner loop: `Trainer.run` (moc/training/trainer.py), `Flow.loss` (moc/diffusion/flow.py),
`StreamModel.forward` (models/stream.py), `moc_attention` (moc/attention.py).
"""

import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

import torch

from configs.command import command
from configs.preflight import check_weights_fit, look_first, preflight
from configs.run_record import begin, hold_run, own_name, record_launch, sampling_command
from configs.schema import TrainConfig
from configs.world import Data, open_data
from data.loading.endless import open_loader
from film.samples import scene_drawer
from moc.schedule import MoCSchedule
from moc.training import Metrics, Parallel, Trainer, Validator, dead_processes, read_metrics
from moc.training.curves import draw_curves
from moc.training.interruption import GOES_ON, TRIAL_ENDED, ending_at_signals, ignore_signals, leave_unfinished
from models import build_model
from models.checkpoints.seen import Seen, share_without_captions

logger = logging.getLogger(__name__)


@command("train", TrainConfig)
def main(config: TrainConfig) -> None:
    """Runs or resumes a training run, which one launch at a time may do."""
    config = replace(config, name=own_name(config.name))
    with ending_at_signals(dead_processes, TRIAL_ENDED if config.preflight else GOES_ON):
        parallel = Parallel(config.parallel)
        with parallel.naming_absent():
            dataset = open_data(config, parallel)
            given = config, dataset, parallel
            with hold_run(config, parallel):
                finished, well = preflight(*given, _train) if config.preflight else (_train(*given), True)
        parallel.close()
    if not finished:
        leave_unfinished()
    if not well:
        sys.exit(1)


def _train(config: TrainConfig, dataset: Data, parallel: Parallel) -> bool:
    """Trains until the end, or until a signal comes; returns whether it came to the end."""
    run_folder, is_trial = config.run_folder, config.preflight
    checkpoint = parallel.of_main(lambda: begin(config))
    check_weights_fit(config, dataset, parallel)
    without_captions = share_without_captions(config.data.drop_captions, checkpoint or config.model.path)
    torch.manual_seed(config.seed)
    model = build_model(config.model, dataset.latent_channels, dataset.text_dim)
    model.execution = config.execution
    config.parallel.set_recomputation(model)

    def save_extras(folder: Path) -> None:
        dataset.save_encoders(folder / "encoders")
        Seen(dataset.sizes, dataset.frame_rates, dataset.max_shots, without_captions).write(folder)
        draw_curves(run_folder, read_metrics(run_folder))

    moc, schedule, optim, length = config.moc, MoCSchedule(config.schedule), config.optim, config.trainer
    draw = scene_drawer(dataset, config.data, config.flow, run_folder, parallel) if length.sample_every else None
    trainer = Trainer(
        parallel, model, config.flow, moc, schedule, optim, length, run_folder, config.seed, save_extras, draw, is_trial
    )
    data_state = trainer.resume(checkpoint) if checkpoint else {"position": 0}
    loader = open_loader(
        dataset, config.data, model.stream, config.moc.chunk_tokens,
        rank=parallel.data_rank, world_size=parallel.data_ranks, accumulation=config.parallel.accumulation,
        start_position=data_state["position"],
    )  # fmt: skip
    validator = Validator(list(loader.held_out()), config.flow) if config.data.validation else None
    if trainer.step < length.num_steps:
        look_first(config, dataset, parallel, trainer)
    elif parallel.is_main:
        logger.info("%s is already finished: step %d of %d", run_folder, trainer.step, length.num_steps)
    record_launch(config, parallel, trainer.step)
    with parallel.together():
        metrics = Metrics(run_folder, config.tracking, asdict(config), trainer.step) if parallel.is_main else None
    finished = trainer.run(loader, metrics, validator)
    if not finished:
        ignore_signals()
    elif parallel.is_main and not is_trial:
        logger.info("%s has a model: %s", run_folder, sampling_command(run_folder))
    if metrics:
        metrics.close()
    return finished


if __name__ == "__main__":
    main()
