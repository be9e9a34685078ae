"""Films a prompt script: `python sample.py checkpoint=PATH script=FILE out=DIR key=value ...`.

Writes to DIR, each as soon as it is known: latents/NN.safetensors, shots/NN.mp4, then video.mp4, metadata.json with
everything to repeat it, storyboard.png and routing.png.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from configs.command import command
from configs.schema import SampleConfig
from film.filmmaker import make_film
from film.folder import FilmFolder
from film.plan import plan_film
from film.script import load_script
from film.storyboard import draw_routing_map, draw_storyboard
from moc import __version__
from moc.diffusion import Story, sample_shots
from moc.memory import SAMPLING, enough_for
from moc.statistics import RoutingMap
from moc.training import Parallel, ParallelConfig
from moc.training.checkpoint import sound_checkpoint
from models import load_denoiser, load_encoders, place
from models.checkpoints.contents import read_settings


@command("sample", SampleConfig)
def main(config: SampleConfig) -> None:
    """Loads model and script, films shot by shot, and writes what came of it."""
    started, folder = time.time(), FilmFolder(config.out)
    script = load_script(config.script)
    parallel = Parallel(ParallelConfig(config.device, config.precision))
    device = parallel.device

    checkpoint = sound_checkpoint(config.checkpoint, "ema") or Path(config.checkpoint)
    model = load_denoiser(checkpoint, config.low_noise_checkpoint, parallel.dtype)
    moc, flow = read_settings(checkpoint)
    moc, flow = moc.override(config.moc), flow if config.shift is None else replace(flow, shift=config.shift)
    encoders = load_encoders(config.encoders_path or checkpoint)
    codec, text = encoders.codec.to(device), encoders.text.to(device)

    plan = plan_film(script, codec, device)
    story = Story(plan.shapes, *plan.texts(text, script), plan.given, plan.cuts)
    text.to("cpu")  # its memory is the model's from here on
    routing_map = RoutingMap(len(plan.shapes))

    def sampling(on_step: Callable[[int, int], None]) -> Iterator[tuple[int, Tensor]]:
        return sample_shots(model, model.stream, moc, flow, story, config.sampler, on_step, routing_map)

    with parallel.autocast(), enough_for(f"a film of {len(plan.shapes)} shots", SAMPLING):
        model = place(model, device, config.offload)
        film = make_film(folder, script.fps, codec, sampling)
    record = {
        "script": asdict(script),
        "config": asdict(config),
        "checkpoint": str(checkpoint.resolve()),
        "moc": moc.to_dict(),
        "flow": asdict(flow),
        "num_frames": film.num_frames,
        "latent_shapes": plan.shapes,
        "routing": routing_map.shares().tolist(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"moc": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "seconds": round(time.time() - started, 1),
    }
    folder.write_metadata(record)
    captions = [shot.prompt for shot in script.shots]
    folder.draw("storyboard.png", draw_storyboard, script.title, captions, film.thumbnails)
    folder.draw("routing.png", draw_routing_map, routing_map.shares()[plan.filmed][:, plan.filmed])
    print(*folder.files(), sep="\n")


if __name__ == "__main__":
    main()
