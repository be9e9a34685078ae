"""Codecs over the shots of a sample, apart and as one video: exact, streaming, and so through the whole pipeline."""

import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data import bucketing
from data.dataset import DataConfig, open_dataset
from data.errors import DataError
from data.manifest import SceneRecord, ShotRecord, write_manifest
from data.prepare import PrepareConfig, Prepared, prepare
from data.shards import open_cache
from data.video import open_video
from models import load_encoders
from models.codec import Codec, CodecConfig, CodecKind, regroup
from models.encoders import EncodersConfig, build_encoders
from models.vae import WanCodec, build_codec
from tests import pipeline
from tests.encoders import PoolCodec, WordText, numbers_in
from tests.films import write_numbered
from tests.test_vae import WAN21, WAN22, moving_gradient

KINDS = ("transform", "wan 2.1", "wan 2.2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny AutoencoderKLWan of both shapes."""
    made = {}
    for kind, settings in (("wan 2.1", WAN21), ("wan 2.2", WAN22)):
        torch.manual_seed(0)
        channels = settings["z_dim"]
        vae = AutoencoderKLWan(
            **settings, latents_mean=[0.1 * c for c in range(channels)], latents_std=[1.0 + c for c in range(channels)]
        )
        made[kind] = tmp_path_factory.mktemp("vae")
        vae.save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def build(folders: dict[str, Path]) -> Callable[..., Codec]:
    def build(kind: str, continuous: bool = True, tiling: bool = False) -> Codec:
        if kind == "transform":
            return build_codec(CodecConfig(channels=16, continuous=continuous))
        return build_codec(CodecConfig(CodecKind.wan, str(folders[kind]), tiling=tiling, continuous=continuous))

    return build


def split(video: Tensor, codec: Codec, latents: list[int]) -> list[Tensor]:
    """The shots of a video by their latent frames."""
    lengths = [codec.pixel_frames(length, shot) for shot, length in enumerate(latents)]
    return list(video.split(lengths, dim=1))


def encode_shots(codec: Codec, shots: list[Tensor]) -> list[Tensor]:
    """Each shot in uneven pieces of a few frames."""
    encode = codec.shot_encoder()
    return [encode(shot.split(3, dim=1)) for shot in shots]


def decode_shots(codec: Codec, latents: list[Tensor]) -> list[Tensor]:
    decode = codec.shot_decoder()
    return [torch.cat(list(decode(latent)), dim=1) for latent in latents]


def whole(codec: Codec, video: Tensor) -> tuple[Tensor, Tensor]:
    """Latent and decoded video of one causal pass over the whole, by diffusers itself for Wan."""
    if not isinstance(codec, WanCodec):
        alone = build_codec(CodecConfig(channels=16))
        latent = alone.encode(video)
        return latent, alone.decode(latent)
    with torch.no_grad():
        mode = codec.vae.encode(video[None]).latent_dist.mode()
        return ((mode - codec.mean) / codec.std)[0], codec.vae.decode(mode).sample[0]


# Frames and latent frames


def test_the_lengths_of_shots() -> None:
    apart, continuous = PoolCodec(), PoolCodec(continuous=True)
    for codec, shot in ((apart, 0), (apart, 3), (continuous, 0)):
        assert [codec.pixel_frames(t, shot) for t in (1, 2, 5)] == [1, 5, 17]
        assert [codec.whole_frames(f, shot) for f in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 5, 5, 9]
        assert [codec.nearest_frames(f, shot) for f in (0.2, 2, 3.5, 7.5)] == [1, 1, 5, 9]
    assert [continuous.pixel_frames(t, 1) for t in (1, 2, 5)] == [4, 8, 20]
    assert [continuous.whole_frames(f, 1) for f in (0, 1, 3, 4, 7, 8)] == [0, 0, 0, 4, 4, 8]
    assert [continuous.nearest_frames(f, 2) for f in (-3, 1, 5.5, 6.5)] == [4, 4, 4, 8]
    for codec in (apart, continuous):
        for shot in (0, 1):
            assert [codec.latent_frames(codec.pixel_frames(t, shot), shot) for t in (1, 2, 9)] == [1, 2, 9]
    with pytest.raises(
        ValueError, match=r"a shot of 9 frames cannot be encoded: the codec takes 4n frames \(8 or 12\)"
    ):
        continuous.latent_frames(9, 1)
    with pytest.raises(ValueError, match=r"a shot of 2 frames .* takes 4n frames \(4 or 8\)"):
        continuous.latent_frames(2, 1)


def test_frames_are_regrouped() -> None:
    frames = torch.arange(20).view(1, 20, 1, 1)
    for pieces in ([20], [1, 19], [7, 0, 3, 10], [1] * 20):
        groups = [group.flatten().tolist() for group in regroup(frames.split(pieces, dim=1), 5, 4)]
        assert groups == [[*range(5)], [*range(5, 9)], [*range(9, 13)], [*range(13, 17)], [*range(17, 20)]]
    assert list(regroup([], 5, 4)) == []


# Exactness


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_shots_are_one_video_cut_up(build: Callable[..., Codec], kind: str) -> None:
    codec, lengths = build(kind), [3, 1, 10, 2]
    video = moving_gradient(codec.pixel_frames(sum(lengths)))
    expected, decoded = whole(codec, video)
    latents = encode_shots(codec, split(video, codec, lengths))
    assert [latent.shape[1] for latent in latents] == lengths
    torch.testing.assert_close(torch.cat(latents, 1), expected, rtol=1e-5, atol=1e-5)
    shots = decode_shots(codec, latents)
    assert [shot.shape[1] for shot in shots] == [9, 4, 40, 8]
    torch.testing.assert_close(torch.cat(shots, 1), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shots_apart_know_nothing_of_each_other(build: Callable[..., Codec], kind: str) -> None:
    codec = build(kind, continuous=False)
    video = moving_gradient(14)
    shots = split(video, codec, [2, 3])
    latents = encode_shots(codec, shots)
    for shot, latent, decoded in zip(shots, latents, decode_shots(codec, latents), strict=True):
        expected = whole(codec, shot)
        torch.testing.assert_close(latent, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoded, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_shot_is_the_same_in_both_modes(build: Callable[..., Codec], kind: str) -> None:
    apart, continuous = build(kind, continuous=False), build(kind)
    video = moving_gradient(13)
    latent = apart.encode(video)
    assert torch.equal(continuous.encode(video), latent)
    assert torch.equal(continuous.decode(latent), apart.decode(latent))
    assert apart.fingerprint != continuous.fingerprint


@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2"])
def test_a_later_shot_depends_on_the_ones_before(build: Callable[..., Codec], kind: str) -> None:
    codec = build(kind)
    latents = [torch.randn(codec.latent_channels, 2, 2, 2) for _ in range(2)]
    after = decode_shots(codec, latents)[1]
    assert not torch.allclose(decode_shots(codec, [-latents[0], latents[1]])[1], after, atol=1e-3)
    second = decode_shots(build(kind, continuous=False), latents)[1]
    assert (after.shape[1], second.shape[1]) == (8, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_between_shots_leaves_the_stream_alone(build: Callable[..., Codec], kind: str) -> None:
    codec = build(kind)
    shots = split(moving_gradient(17), codec, [2, 3])
    encode, decode = codec.shot_encoder(), codec.shot_decoder()
    expected = encode_shots(codec, shots)
    frames = decode_shots(codec, expected)
    for shot, latent, shown in zip(shots, expected, frames, strict=True):
        still = codec.encode(shots[0][:, :1])
        assert torch.equal(encode([shot]), latent)
        codec.decode(still)
        assert torch.equal(torch.cat(list(decode(latent)), 1), shown)


@pytest.mark.parametrize("kind", ["wan 2.1", "wan 2.2"])
def test_tiles_stream_as_diffusers_tiles_the_whole(build: Callable[..., Codec], kind: str) -> None:
    codec, lengths = build(kind, tiling=True), [2, 3]
    codec.latents_at_once = 2
    video = moving_gradient(17, 16, 320)
    latents = encode_shots(codec, split(video, codec, lengths))
    frames = torch.cat(decode_shots(codec, latents), 1)
    assert not torch.allclose(frames, torch.cat(decode_shots(build(kind), latents), 1), atol=1e-4)
    codec.vae.enable_tiling()
    with torch.no_grad():
        joined = torch.cat(latents, 1)
        if kind == "wan 2.1":  # of patches of 2 x 2, diffusers' tiles are twice as large when it encodes
            torch.testing.assert_close(joined, whole(codec, video)[0], rtol=1e-5, atol=1e-5)
        expected = codec.vae.decode((joined * codec.std + codec.mean)[None]).sample[0]
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


# Memory


class Watch:
    """Hands out frames whose memory it watches. most: the frames of the pieces that were held at once."""

    def __init__(self) -> None:
        self.arrays: list[tuple[weakref.ref, int]] = []
        self.most = 0

    def __call__(self, frames: Tensor) -> Tensor:
        array = frames.numpy().copy()
        self.arrays.append((weakref.ref(array), frames.shape[1]))
        self.most = max(self.most, sum(length for held, length in self.arrays if held() is not None))
        return torch.from_numpy(array)  # keeps the array for as long as any view of it lives


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_holds_few_frames(build: Callable[..., Codec], kind: str) -> None:
    codec, watch = build(kind), Watch()
    encode = codec.shot_encoder()
    limit = 4 * codec.latents_at_once + 2 * 6
    for length in (17, 12, 60):

        def pieces(length: int = length) -> Iterator[Tensor]:
            return (watch(torch.zeros(3, min(6, length - at), 16, 16)) for at in range(0, length, 6))

        encode(pieces())
        assert 6 <= watch.most <= limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("continuous", [False, True])
def test_streams_do_not_grow(build: Callable[..., Codec], kind: str, continuous: bool) -> None:
    codec = build(kind, continuous)
    encode, decode = codec.shot_encoder(), codec.shot_decoder()
    after_short: tuple[int, int] | None = None
    for length in (3, 24):
        latent = encode([torch.zeros(3, codec.pixel_frames(length, encode.shot), 16, 16)])
        pieces = list(decode(latent))
        assert max(piece.shape[1] for piece in pieces) <= 4 * codec.latents_at_once
        sizes = held_bytes(encode.memory), held_bytes(decode.memory)
        assert sizes == (after_short or sizes)
        after_short = sizes


def held_bytes(memory: dict) -> int:
    return sum(x.nbytes for features in memory.values() for x in features if isinstance(x, Tensor))


# Through the pipeline


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder with a numbered film of 60 frames."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_numbered(folder / "film.mkv", 60)
    return folder


def prepared(films: Path, *spans: tuple[int, int], codec: Codec | None = None, **changes) -> Prepared:
    """The scene of these shots, prepared by a continuous codec."""
    shots = tuple(ShotRecord(start, end, f"shot at {start}") for start, end in spans)
    write_manifest(films / "manifest.jsonl", [SceneRecord(id="a", video="film.mkv", caption="a film", shots=shots)])
    settings = {"output": str(films.parent / "out"), "size": [64, 160], "detector": "adaptive", "max_frames": 25}
    config = PrepareConfig(input=str(films), **settings | changes)
    return prepare(config, codec or PoolCodec(continuous=True), WordText())


def test_later_shots_are_whole_latents_of_four(films: Path) -> None:
    """Skipped shots leave no trace, a long shot goes on as the codec does, and each sample opens anew."""
    made = prepared(films, (3, 14), (14, 17), (20, 26), (26, 60), shots_per_sample=3)
    cache = open_cache(made.cache)
    assert [[numbers_in(latent) for latent in cache.latents(scene)] for scene in cache.scenes] == [
        [[3, 7, 11], [20], [26, 30, 34, 38, 42, 46]],
        [[50, 54, 58]],
    ]
    lines = [json.loads(line) for line in made.manifest.read_text().splitlines()]
    assert [(s["start"], s["end"], s["cut"]) for line in lines for s in line["shots"]] == [
        *((3, 12, True), (20, 24, True), (26, 50, True)),
        (50, 59, True),
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
    watch, fit = Watch(), bucketing.fit
    monkeypatch.setattr(bucketing, "_READ_PIXELS", 5 * 64 * 160)
    monkeypatch.setattr(bucketing, "fit", lambda frames, size: watch(fit(frames, size)))
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
    encoders = build_encoders(EncodersConfig(codec=CodecConfig(channels=8)), ["word"])
    encoders.save(tmp_path)
    record = json.loads((tmp_path / "encoders.json").read_text())
    del record["codec"]["continuous"]
    (tmp_path / "encoders.json").write_text(json.dumps(record))
    assert load_encoders(tmp_path).codec.continuous is False


@pytest.fixture(scope="module")
def tuned(world: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny world, prepared with Wan's VAE over whole samples; the cache is beside it."""
    folder = tmp_path_factory.mktemp("continuous")
    settings = (
        "encoders.codec.kind=wan",
        f"encoders.codec.path={folders['wan 2.1']}",
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
    assert [len(part) for part in frames] == [5, 4, 4]
    expected, _ = whole(codec, bucketing.fit(torch.cat(frames), (32, 48)))
    sample = next(sample for sample in (dataset[i] for i in range(len(dataset))) if sample.id == line["id"])
    assert [latent.shape[1] for latent in sample.latents] == [2, 1, 1]
    torch.testing.assert_close(torch.cat(sample.latents, 1).float(), expected, rtol=2e-3, atol=2e-3)


def test_a_film_is_one_decode_of_the_joined_latents(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, np.ndarray] = {}

    def keep(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
        written[path.name] = np.stack(list(frames))
        return len(written[path.name])

    monkeypatch.setattr("data.video.write_video", keep)
    Image.new("RGB", (96, 64), (0, 200, 0)).save(tmp_path / "ref.png")
    shots = [
        {"prompt": "Mia walks.", "seconds": 5 / 12, "image": "ref.png"},
        {"prompt": "Mia waves.", "seconds": 5.6 / 12, "cut": False},  # 4 frames; what is left over goes to the next
        {"prompt": "Gus dances.", "seconds": 5 / 12, "image": "ref.png"},
    ]
    (tmp_path / "story.json").write_text(json.dumps({"size": [32, 48], "fps": 12, "shots": shots}))
    film = pipeline.sample(tuned, tmp_path / "story.json", tmp_path / "film")
    shots = [written[f"{number:02d}.mp4"] for number in (1, 2, 3)]
    assert [len(frames) for frames in shots] == [5, 4, 8]
    record = json.loads((film / "metadata.json").read_text())
    assert [shape[1] for shape in record["latent_shapes"]] == [1, 2, 1, 1, 2]
    latents = [load_file(film / f"latents/{number:02d}.safetensors")["latent"] for number in (1, 2, 3)]
    codec = load_encoders(tuned / "checkpoints/step_0000003/encoders").codec
    assert codec.continuous
    z = torch.cat(latents, 1) * codec.std + codec.mean
    with torch.no_grad():
        decoded = codec.vae.decode(z[None]).sample[0].permute(1, 2, 3, 0)
    expected = ((decoded + 1) * 127.5).numpy()
    assert np.abs(np.concatenate(shots) - expected).max() < 0.6
    assert np.array_equal(np.concatenate(shots), written["video.mp4"])
