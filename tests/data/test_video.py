"""These tests are about frame exactness over all decoders and kinds of file, and what is refused."""

import random
from itertools import accumulate

import av
import numpy as np
import pytest
import torch

from data.errors import DataError
from data.media import decode, resize
from data.media.decode import check_decoder, open_video
from data.media.index import index_video
from data.media.resize import fit, nearest_size, read_pieces, resample
from data.media.write import join_videos, write_video
from moc.errors import UserError
from tests.films import numbered_frame, read_numbers, rotate, trim_by_edit_list, write_numbered, write_paired

NUM_FRAMES = 150
X265 = {"x265-params": "log-level=error:keyint=25"}  # x265's defaults have open groups of pictures
KINDS = {
    "plain": {},
    "open_gop": {"options": {"x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0"}},
    "vfr": {"ticks": list(accumulate(random.Random(0).choices([2, 4, 8], k=NUM_FRAMES)))},
    "hevc": {"codec": "libx265", "options": X265},
    "hevc_10_bit": {"codec": "libx265", "options": X265, "pixel_format": "yuv420p10le"},
    "vp9": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "30"}},
    "av1": {"codec": "libsvtav1", "options": {"preset": "8", "crf": "20", "g": "30"}},
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return {kind: write_numbered(folder / f"{kind}.mkv", NUM_FRAMES, **KINDS[kind]) for kind in KINDS} | {
        "mp4": write_numbered(folder / "plain.mp4", NUM_FRAMES)
    }


DECORD_REFUSES = {"open_gop", "hevc", "hevc_10_bit", "av1"}


def need(decoder):
    """Skips where decord is not installed, or torchcodec, or where that finds no FFmpeg or no fitting torch."""
    if decoder == "decord":
        pytest.importorskip("decord")
    if decoder == "torchcodec":
        pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, OSError, RuntimeError))


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("kind", [*KINDS, "mp4"])
def test_reads_are_exact_by_index(films, kind, decoder):
    need(decoder)
    if decoder == "decord" and kind in DECORD_REFUSES:
        with pytest.raises(DataError, match="use decoder=pyav"):
            open_video(films[kind], decoder)
        return
    reader = open_video(films[kind], decoder)
    assert reader.num_frames == NUM_FRAMES
    assert read_numbers(reader.read(0, NUM_FRAMES)) == list(range(NUM_FRAMES))
    rng = random.Random(1)
    for _ in range(12):
        start = rng.randrange(NUM_FRAMES - 1)
        end = rng.randrange(start + 1, min(NUM_FRAMES, start + 12) + 1)
        assert read_numbers(reader.read(start, end)) == list(range(start, end))


def test_variable_frame_rate_keeps_its_times(films):
    times = index_video(films["vfr"]).times
    ticks = KINDS["vfr"]["ticks"]
    assert times == pytest.approx([(t - ticks[0]) / 100 for t in ticks], abs=2e-3)


def test_repeated_stamps_are_spread_over_the_time_they_share(tmp_path):
    reader = open_video(write_paired(tmp_path / "pairs.mkv"))
    assert reader.index.times == pytest.approx([0.05 * i for i in range(60)])
    assert reader.fps == pytest.approx(20)
    assert "30 of 60 time stamps are missing or repeat the last" in reader.index.stamp_fault
    assert read_numbers(reader.read(40, 60)) == list(range(40, 60))


def test_a_film_whose_stamps_cannot_be_mended_says_what_rate_it_gets(tmp_path):
    """A raw stream has no stamps; an AVI of x264 gives those of B-frames in the order of decoding."""
    for name in ("raw.h264", "jumbled.avi"):
        index = index_video(write_numbered(tmp_path / name, 30))
        assert index.times == pytest.approx([i / 25 for i in range(30)])
        assert "25 fps is assumed" in index.stamp_fault
    assert index_video(write_numbered(tmp_path / "sound.mkv", 30)).stamp_fault == ""


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_rotated_film_comes_upright(tmp_path, decoder):
    need(decoder)
    need("decord")
    path = write_numbered(tmp_path / "phone.mp4", 5)
    plain = open_video(path).read(3, 4)
    rotate(path)
    reader = open_video(path, decoder)
    assert (reader.height, reader.width) == (plain.shape[2], plain.shape[1])
    torch.testing.assert_close(reader.read(3, 4), torch.rot90(plain, k=-1, dims=(1, 2)))
    with pytest.raises(DataError, match="rotation"):
        open_video(path, "decord")


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_edit_list_counts_only_what_is_shown(tmp_path, decoder):
    need(decoder)
    need("decord")
    path = write_numbered(tmp_path / "edited.mp4", 60)
    trim_by_edit_list(path, 13)
    reader = open_video(path, decoder)
    assert reader.num_frames == 47
    assert read_numbers(reader.read(40, 47)) == list(range(53, 60))
    with pytest.raises(DataError, match="edit list"):
        open_video(path, "decord")


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("mpg", "mpeg2video"), ("h264", "libx264")])
def test_what_a_decoder_cannot_read_is_refused(tmp_path, decoder, suffix, codec):
    """Some stop before the end of a transport stream or open no raw one: such a film is read whole or named."""
    need(decoder)
    path = write_numbered(tmp_path / f"a.{suffix}", 30, codec=codec)
    assert read_numbers(open_video(path).read(0, 30)) == list(range(30))
    try:
        outcome = read_numbers(open_video(path, decoder).read(0, 30))
    except DataError as error:
        outcome = error.kind
    assert outcome in (list(range(30)), "decoder-unsafe")


def test_a_missing_decoder_is_said_with_its_remedy(monkeypatch):
    message = (
        "Could not load libtorchcodec. Likely causes:\n ...\nOSError: libavutil.so.60: cannot open shared object file"
    )

    def broken(module):
        raise RuntimeError(message)

    check_decoder("pyav")
    monkeypatch.setattr(decode, "import_module", broken)
    with pytest.raises(DataError, match=r"\(libavutil.* file\): pip install 'torchcodec==0\.13\.\*'") as caught:
        check_decoder("torchcodec")
    assert "\n" not in str(caught.value)


def test_truncated_film_counts_decoded_frames_not_the_header(tmp_path):
    path = write_numbered(tmp_path / "cut.mkv", 100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reader = open_video(path)
    assert 30 < reader.num_frames < 100
    frames = reader.read(0, reader.num_frames)
    assert read_numbers(frames[:30]) == list(range(30))
    assert torch.equal(reader.read(reader.num_frames - 1, reader.num_frames), frames[-1:])


def test_a_changed_file_is_not_read_by_an_old_scan(tmp_path):
    index = index_video(write_numbered(tmp_path / "a.mkv", 50))
    shorter = write_numbered(tmp_path / "a.mkv", 20)
    with pytest.raises(DataError, match="as they did in the scan"):
        open_video(shorter, index=index).read(30, 40)


def write_bytes(path, data):
    path.write_bytes(data)
    return path


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def size_change(path):
    """Returns two raw streams of different sizes, one after the other, as a broadcast recording has."""
    raw = b""
    for size in ((64, 160), (96, 160)):
        video = write_numbered(path.with_suffix(".ts"), 10, size=size)
        raw += video.read_bytes()
        video.unlink()
    return write_bytes(path, raw)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("missing-file", lambda path: path),
        ("zero-byte", lambda path: write_bytes(path, b"")),
        ("not-a-video", lambda path: write_bytes(path, b"no film at all" * 100)),
        ("audio-only", audio_only),
        ("size-change", lambda path: size_change(path)),
        ("not-a-video", lambda path: write_bytes(path, write_numbered(path, 20).read_bytes()[:600])),
    ],
)
def test_unreadable_files_are_named(tmp_path, kind, make):
    path = make(tmp_path / "film.mp4")
    with pytest.raises(DataError) as caught:
        index_video(path)
    assert caught.value.kind == kind
    assert "film" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_out_of_range_reads_and_unknown_decoders(films):
    with pytest.raises(DataError, match="of 150 frames"):
        open_video(films["plain"]).read(140, 151)
    with pytest.raises(DataError, match="decoders are pyav"):
        open_video(films["plain"], "opencv")


def test_written_video_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.mp4"
    assert write_video(path, (numbered_frame(i) for i in range(7)), fps=24) == 7
    assert open_video(path).fps == pytest.approx(24)
    first = path.read_bytes()
    write_video(path, (numbered_frame(i) for i in range(7)), fps=24)
    assert path.read_bytes() == first
    frames = [numbered_frame(0), np.zeros((32, 32, 3), np.uint8)]
    with pytest.raises(ValueError, match="frame 1"):
        write_video(tmp_path / "b.mp4", frames, fps=24)
    with pytest.raises(UserError, match="even"):
        write_video(tmp_path / "b.mp4", [np.zeros((33, 32, 3), np.uint8)], fps=24)
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "b.mp4", [], fps=24)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_resample_shows_what_is_on_screen():
    times = [i / 24 for i in range(48)]
    assert resample(times, 0, 48, 12) == list(range(0, 48, 2))
    assert resample(times, 10, 20, None) == list(range(10, 20))
    assert resample(times, 0, 24, 48) == [i // 2 for i in range(48)]
    for fps in (24, 25, 29.97, 30):  # at the video's own rate each frame is shown once, whatever rounding does
        assert all(
            resample([i / fps for i in range(90)], start, start + 45, fps) == list(range(start, start + 45))
            for start in range(45)
        )
    slow_then_fast = [0.0, 0.5, 1.0, 1.1, 1.2, 1.3]
    assert resample(slow_then_fast, 0, 3, 10) == [0] * 5 + [1] * 5 + [2]
    assert resample(slow_then_fast, 0, 6, 10) == [0] * 5 + [1] * 5 + [2, 3, 4, 5] + [5] * 1


def test_the_nearest_aspect_is_taken():
    buckets = [(480, 832), (832, 480), (624, 624)]
    assert nearest_size(1920, 1080, buckets) == (832, 480)
    assert nearest_size(600, 640, buckets) == (624, 624)
    assert nearest_size(134, 100, buckets) == (832, 480)  # by its logarithm, 1.34 is nearer to 1.73 than to 1
    assert nearest_size(100, 134, buckets) == (480, 832)


def test_fit_covers_and_crops_the_centre():
    frames = torch.zeros(2, 40, 120, 3, dtype=torch.uint8)
    frames[:, :, 40:80] = 255
    fitted = fit(frames, (20, 20))
    assert fitted.shape == (3, 2, 20, 20)
    assert fitted[:, :, :, 2:-2].min() == 1
    tall = fit(frames.transpose(1, 2), (20, 20))
    assert tall[:, :, 2:-2].min() == 1
    assert fit(frames, (40, 120)).min() == -1


def test_reading_in_pieces_changes_nothing(films, monkeypatch):
    monkeypatch.setattr(resize, "_READ_PIXELS", 40 * 64 * 160)
    reader = open_video(films["plain"])
    indices = [0, 0, 3, 31, 32, 33, 90, 91, 91, 149]
    pieces = list(read_pieces(reader, indices, (64, 160)))
    assert [piece.shape[1] for piece in pieces] == [6, 3, 1]
    frames = ((torch.cat(pieces, 1) + 1) * 127.5).round().permute(1, 2, 3, 0)
    assert read_numbers(frames) == indices


def test_colours_are_tagged_and_come_back(tmp_path):
    """Pure colours differ most between BT.601 and BT.709."""
    picture = np.zeros((64, 96, 3), np.uint8)
    colours = [(200, 30, 30), (30, 200, 30), (30, 60, 200)]
    for index, colour in enumerate(colours):
        picture[:, 32 * index : 32 * index + 32] = colour
    write_video(tmp_path / "film.mp4", [picture] * 3, 12, bt709=True)
    with av.open(str(tmp_path / "film.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    frame = open_video(tmp_path / "film.mp4").read(1, 2)[0].numpy()
    for index, colour in enumerate(colours):
        assert np.abs(frame[32, 32 * index + 16].astype(int) - colour).max() <= 4


@pytest.mark.parametrize("lengths", [[1], [9, 1, 2, 40, 5], [2, 30], [30, 2, 1, 1]])
def test_joined_videos_show_the_frames_of_their_parts(tmp_path, lengths):
    """Short videos are stored without reordered frames, long ones with them."""
    rng = np.random.default_rng(0)
    videos = [tmp_path / f"{index}.mp4" for index in range(len(lengths))]
    for video, length in zip(videos, lengths, strict=True):
        still = rng.integers(0, 255, (64, 96, 3), np.uint8)
        write_video(video, [np.roll(still, shift, 1) for shift in range(length)], 12)
    assert join_videos(tmp_path / "film.mp4", videos) == sum(lengths)
    readers = [open_video(path) for path in (*videos, tmp_path / "film.mp4")]
    *frames, whole = [reader.read(0, reader.num_frames) for reader in readers]
    assert torch.equal(torch.cat(frames), whole)
    assert readers[-1].index.stamp_fault == ""
    assert readers[-1].index.times == pytest.approx([index / 12 for index in range(sum(lengths))])
    with pytest.raises(FileNotFoundError):
        join_videos(tmp_path / "other.mp4", [videos[0], tmp_path / "nowhere.mp4"])
    assert not list(tmp_path.glob("*other*"))
