"""Films a prompt script: `python sample.py checkpoint=PATH script=FILE out=DIR key=value ...`.

Writes to DIR, each as soon as it is known: latents/NN.safetensors, shots/NN.mp4, then video.mp4, storyboard.png,
routing.png and, last, metadata.json with everything to repeat it.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from configs.command import command
from configs.schema import SampleConfig
from data.film import pictures, plan_film
from data.script import load_script
from data.storyboard import draw_routing_map, draw_storyboard, pick_frames
from data.video import write_video
from moc import MoCConfig
from moc.diffusion import Story, sample_shots
from moc.statistics import RoutingMap
from moc.training import resolve_device
from moc.training.checkpoint import find_checkpoint, read_settings
from models import load_denoiser, load_encoders, place


@command("sample", SampleConfig)
def main(config: SampleConfig) -> None:
    """Loads model and script, films shot by shot, and writes what came of it."""
    started, out = time.time(), Path(config.out)
    if (out / "metadata.json").exists():
        raise FileExistsError(f"out={out} already holds a film; choose another folder")
    script = load_script(config.script)
    device = resolve_device(config.device)

    checkpoint = find_checkpoint(config.checkpoint) or Path(config.checkpoint)
    model = load_denoiser(checkpoint, config.low_noise_checkpoint, config.weights_dtype(device))
    moc, flow = read_settings(checkpoint)
    moc, flow = MoCConfig.from_dict(moc.to_dict() | config.moc), replace(flow, shift=config.shift or flow.shift)
    encoders = load_encoders(config.encoders_path or checkpoint)
    codec, text = encoders.codec.to(device), encoders.text.to(device)

    plan = plan_film(script, codec)
    story = Story(plan.shapes, *plan.texts(text, script), plan.given, plan.cuts)
    text.to("cpu")  # its memory is the model's from here on
    model = place(model, device, config.offload)
    decode, routing_map = codec.shot_decoder(), RoutingMap(len(plan.shapes))
    thumbnails: list[np.ndarray] = []

    def film() -> Iterator[np.ndarray]:
        with tqdm(desc="sample", unit="step") as bar:

            def on_step(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            shots = sample_shots(model, model.stream, moc, flow, story, config.sampler, on_step, routing_map)
            for number, (_, latent) in enumerate(shots, start=1):
                save_file({"latent": latent.contiguous()}, _inside(out, f"latents/{number:02d}.safetensors"))
                frames = np.concatenate([pictures(piece) for piece in decode(latent)])
                write_video(_inside(out, f"shots/{number:02d}.mp4"), frames, script.fps)
                thumbnails.append(frames[pick_frames(len(frames))])
                yield from frames

    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        num_frames = write_video(out / "video.mp4", film(), script.fps)
    draw_storyboard(out / "storyboard.png", script.title, [shot.prompt for shot in script.shots], thumbnails)
    draw_routing_map(out / "routing.png", routing_map.shares()[plan.filmed][:, plan.filmed])
    record = {
        "script": asdict(script),
        "config": asdict(config),
        "checkpoint": str(checkpoint.resolve()),
        "moc": moc.to_dict(),
        "flow": asdict(flow),
        "num_frames": num_frames,
        "latent_shapes": plan.shapes,
        "routing": routing_map.shares().tolist(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("moc", "torch", "diffusers", "transformers")},
        "seconds": round(time.time() - started, 1),
    }
    (out / "metadata.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"{out / 'video.mp4'}\n{out / 'storyboard.png'}\n{out / 'routing.png'}")


def _inside(out: Path, name: str) -> Path:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    main()
