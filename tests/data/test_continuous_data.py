"""These tests are about the shots of a sample as one video to the codec, from preparing over the cache and training to
the film."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.cache.reader import open_cache
from data.errors import DataError
from data.loading.dataset import DataConfig, open_dataset
from data.manifest import SceneRecord, ShotRecord, write_manifest
from data.media import resize
from data.media.decode import open_video
from data.media.write import write_video
from data.prepare.pipeline import PrepareConfig, Prepared, prepare
from moc.errors import UserError
from models import load_encoders
from models.encoders.codec import Codec, CodecConfig, CodecKind
from models.encoders.pair import EncodersConfig, build_encoders
from tests import pipeline
from tests.codecs import Watch, save_tiny_wan, whole
from tests.encoders import PoolCodec, WordText, numbers_in
from tests.films import write_numbered


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Returns a folder with a numbered film of 60 frames."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_numbered(folder / "film.mkv", 60)
    return folder


def prepared(films: Path, *spans: tuple[int, int], codec: Codec | None = None, **changes) -> Prepared:
    """Returns the scene of these shots, prepared by a continuous codec."""
    shots = tuple(ShotRecord(start, end, f"shot at {start}") for start, end in spans)
    write_manifest(films / "manifest.jsonl", [SceneRecord(id="a", video="film.mkv", caption="a film", shots=shots)])
    settings = {"output": str(films.parent / "out"), "size": [64, 160], "detector": "adaptive", "max_frames": 25}
    config = PrepareConfig(input=str(films), **settings | changes)
    return prepare(config, codec or PoolCodec(continuous=True), WordText())


def test_later_shots_are_whole_latents_of_four(films: Path) -> None:
    """Skipped shots leave no trace, a long shot goes on as the codec does, into the next sample too."""
    made = prepared(films, (3, 14), (14, 17), (20, 26), (26, 60), shots_per_sample=3)
    cache = open_cache(made.cache)
    assert [[numbers_in(latent) for latent in cache.latents(scene)] for scene in cache.scenes] == [
        [[3, 7, 11], [20], [26, 30, 34, 38, 42, 46]],
        [[50, 54, 58]],
    ]
    lines = [json.loads(line) for line in made.manifest.read_text().splitlines()]
    assert [(s["start"], s["end"], s["cut"]) for line in lines for s in line["shots"]] == [
        *((3, 12, True), (20, 24, True), (26, 50, True)),
        (50, 59, False),
    ]
    assert [problem["kind"] for problem in made.report.problems] == ["short-shot"]
    with pytest.raises(DataError, match="3 is below this codec's least, 4"):
        prepared(films, (0, 9), min_frames=1, max_frames=3)


def test_online_latents_equal_stored_ones(films: Path) -> None:
    spans = ((3, 14), (20, 28), (30, 60))
    stored = open_cache(prepared(films, *spans).cache)
    online = open_cache(
        prepared(films, *spans, online=True).cache, load_codec=lambda encoders: PoolCodec(continuous=True)
    )
    (now,), (then,) = online.scenes, stored.scenes
    assert [shape[1] for shape in now.latent_shapes] == [3, 2, 6, 1]
    assert now.latent_shapes == then.latent_shapes
    assert all(torch.equal(a, b) for a, b in zip(online.latents(now), stored.latents(then), strict=True))


@pytest.mark.parametrize("online", [False, True])
def test_preparing_holds_few_frames(films: Path, monkeypatch: pytest.MonkeyPatch, online: bool) -> None:
    watch, fit = Watch(), resize.fit
    monkeypatch.setattr(resize, "_READ_PIXELS", 5 * 64 * 160)
    monkeypatch.setattr(resize, "fit", lambda frames, size: watch(fit(frames, size)))
    codec = PoolCodec(continuous=True)
    codec.latents_at_once = 1
    cache = open_cache(prepared(films, (0, 25), (25, 60), codec=codec, online=online).cache, load_codec=lambda _: codec)
    assert sum(latent.shape[1] for latent in cache.latents(cache.scenes[0])) == 7 + 8
    assert len(watch.arrays) >= 12
    assert watch.most <= 15


def test_the_setting_makes_another_cache_and_travels_with_it(world: Path, tmp_path: Path) -> None:
    codecs = []
    for continuous in ("false", "true"):
        pipeline.prepare(world, tmp_path / "out", f"encoders.codec.continuous={continuous}")
    for folder in sorted((tmp_path / "out/cache").iterdir()):
        codecs.append(load_encoders(folder / "encoders").codec)
        lengths = [[shape[1] for shape in scene.latent_shapes] for scene in open_cache(folder).scenes]
        assert lengths == [[2, 1, 1] if codecs[-1].continuous else [2, 2, 2]] * 4
    assert {codec.continuous for codec in codecs} == {False, True}


def test_encoders_written_before_the_setting_are_apart(tmp_path: Path) -> None:
    encoders = build_encoders(EncodersConfig(codec=CodecConfig(CodecKind.lapped, channels=8)), ["word"])
    encoders.save(tmp_path)
    record = json.loads((tmp_path / "encoders.json").read_text())
    del record["codec"]["continuous"]
    (tmp_path / "encoders.json").write_text(json.dumps(record))
    assert load_encoders(tmp_path).codec.continuous is False


@pytest.mark.parametrize("change", [{"kind": "transform"}, {"smoothing": 3}, {"channels": 65}])
def test_encoders_of_another_version_are_refused(tmp_path: Path, change: dict) -> None:
    """The codec `transform` is one of before: its latents would decode wrongly."""
    build_encoders(EncodersConfig(), ["word"]).save(tmp_path)
    record = json.loads((tmp_path / "encoders.json").read_text())
    record["codec"] |= change
    (tmp_path / "encoders.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"encoders\.json names no encoders of this version .*: prepare"):
        load_encoders(tmp_path)


@pytest.fixture(scope="module")
def tuned(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run on the tiny world, prepared with Wan's VAE over whole samples; the cache is beside it."""
    folder = tmp_path_factory.mktemp("continuous")
    vae = save_tiny_wan(folder / "vae")
    settings = (
        "encoders.codec.kind=wan",
        f"encoders.codec.path={vae}",
        "encoders.codec.continuous=true",
    )
    return pipeline.train(pipeline.prepare(world, folder / "prepared", *settings), folder / "run")


def test_the_cache_holds_one_encode_of_the_joined_shots(world: Path, tuned: Path) -> None:
    folder = tuned.parent / "prepared"
    dataset = open_dataset(DataConfig(path=str(folder)))
    codec = load_encoders(dataset.encoders_folder).codec
    line = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    reader = open_video(world / line["video"])
    frames = [reader.read(shot["start"], shot["end"]) for shot in line["shots"]]
    assert [len(shot) for shot in frames] == [5, 4, 4]
    expected, _ = whole(codec, resize.fit(torch.cat(frames), (32, 48)))
    sample = next(sample for sample in (dataset[i] for i in range(len(dataset))) if sample.id == line["id"])
    assert [latent.shape[1] for latent in sample.latents] == [2, 1, 1]
    torch.testing.assert_close(torch.cat(sample.latents, 1).float(), expected, rtol=2e-3, atol=2e-3)


def test_a_film_is_one_decode_of_the_joined_latents(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, np.ndarray] = {}

    def keep(path: Path, frames: Iterable[np.ndarray], *how, **others) -> int:
        written[path.name] = np.stack(list(frames))
        return write_video(path, written[path.name], *how, **others)

    monkeypatch.setattr("film.folder.write_video", keep)
    Image.new("RGB", (96, 64), (0, 200, 0)).save(tmp_path / "ref.png")
    shots = [
        {"prompt": "Mia walks.", "seconds": 5 / 12, "image": "ref.png"},
        {"prompt": "Mia waves.", "seconds": 5.6 / 12, "cut": False},  # 4 frames; the rest goes to the next shot
        {"prompt": "Gus dances.", "seconds": 5 / 12, "image": "ref.png"},
    ]
    (tmp_path / "story.json").write_text(json.dumps({"size": [32, 48], "fps": 12, "shots": shots}))
    film = pipeline.sample(tuned, tmp_path / "story.json", tmp_path / "film")
    shots = [written[f"{number:02d}.mp4"] for number in (1, 2, 3)]
    assert [len(frames) for frames in shots] == [5, 4, 7]  # the last shot decodes to 8, but the script asks for 7
    record = json.loads((film / "metadata.json").read_text())
    assert [shape[1] for shape in record["latent_shapes"]] == [1, 2, 1, 1, 2]
    latents = [load_file(film / f"latents/{number:02d}.safetensors")["latent"] for number in (1, 2, 3)]
    codec = load_encoders(tuned / "checkpoints/step_0000003/encoders").codec
    assert codec.continuous
    z = torch.cat(latents, 1) * codec.std + codec.mean
    with torch.no_grad():
        decoded = codec.vae.decode(z[None]).sample[0].permute(1, 2, 3, 0)
    expected = ((decoded + 1) * 127.5).numpy()
    assert np.abs(np.concatenate(shots) - expected[:16]).max() < 0.6
    readers = [open_video(film / name) for name in ("shots/01.mp4", "shots/02.mp4", "shots/03.mp4", "video.mp4")]
    *shots, video = [reader.read(0, reader.num_frames) for reader in readers]
    assert torch.equal(torch.cat(shots), video)
