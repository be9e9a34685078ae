"""The storyboard and the routing map of a film show what they are drawn of."""

import numpy as np
import pytest
import torch
from PIL import Image

from film.storyboard import Panel, draw_routing_map, draw_storyboard, pick_frames


@pytest.mark.parametrize(
    ("num_frames", "expected"), [(1, [0]), (3, [0, 1, 2]), (9, [0, 2, 4, 6, 8]), (21, [0, 5, 10, 15, 20])]
)
def test_thumbnails_are_spread_over_the_shot(num_frames, expected):
    assert pick_frames(num_frames) == expected


def colour_share(image: Image.Image, colour) -> float:
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return float((np.abs(pixels - colour).max(-1) < 12).mean())


def panels(captions, rows) -> list[Panel]:
    pairs = zip(captions, rows, strict=True)
    return [
        Panel(number, caption, 5.0, "goes on" if number == 2 else "cut", frames)
        for number, (caption, frames) in enumerate(pairs, start=1)
    ]


def test_a_panel_tells_its_length_and_its_cut():
    first, second = panels(["a", "b"], [None, None])
    assert (first.head, second.head) == ("1 · 5.0 s · cut", "2 · 5.0 s · goes on")


def test_the_storyboard_shows_a_row_for_each_shot(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    rows = [np.full((5, 36, 64, 3), colour, np.uint8) for colour in colours]
    rows[1] = rows[1][:2]  # a short shot
    draw_storyboard(tmp_path / "board.png", "A story", panels(["one", "two " * 90, "three"], rows))
    image = Image.open(tmp_path / "board.png")
    assert image.width > image.height > 300
    shares = [colour_share(image, colour) for colour in colours]
    assert shares[0] == pytest.approx(shares[2], rel=0.1)
    assert shares[1] == pytest.approx(2 / 5 * shares[0], rel=0.2)
    assert 0.1 < shares[0] < 5 / 18
    heights = [
        np.where((np.abs(np.asarray(image.convert("RGB")).astype(int) - c).max(-1) < 12).any(1))[0].mean()
        for c in colours
    ]
    assert heights == sorted(heights)


@pytest.mark.parametrize(
    "text",
    [
        "costs $5 or $x_1",
        r"\frac{$a",
        "\N{RABBIT} runs \N{SNOWMAN}",
        "兔子在草地上" * 60,
        "\ud83d",
        "",
        "a\nb\t\x00c",
        "w" * 2000,
    ],
)
def test_any_text_can_be_drawn(tmp_path, recwarn, text):
    """Nothing is taken for a formula, and a character that the font lacks is drawn as a box, without a warning."""
    rows = [np.zeros((5, 36, 64, 3), np.uint8)] * 2
    draw_storyboard(tmp_path / "board.png", text, panels([text, "plain"], rows))
    image = np.asarray(Image.open(tmp_path / "board.png").convert("L"))
    top, bottom = image[48 : 48 + 186, :330], image[48 + 194 :, :330]  # the two captions
    assert (top < 128).any()
    assert (bottom < 128).any()
    assert (image[:48] < 128).any() == bool(text)
    assert (image[:, 330:338] == 255).all()  # no caption reaches the pictures
    assert not recwarn


def test_a_long_caption_is_cut_where_its_cell_ends(tmp_path):
    rows = [np.full((5, 18, 64, 3), 255, np.uint8)] * 2
    draw_storyboard(tmp_path / "board.png", "", panels(["word " * 300, ""], rows))
    dark = (np.asarray(Image.open(tmp_path / "board.png").convert("L")) < 128).any(axis=1)
    assert dark[48:141].sum() > 40
    assert not dark[141:149].any()


def test_a_map_of_many_shots_stays_small(tmp_path):
    for num_shots in (12, 13, 80):
        shares = torch.tril(torch.ones(num_shots, num_shots, dtype=torch.float64), -1) / num_shots
        draw_routing_map(tmp_path / "routing.png", shares)
        assert max(Image.open(tmp_path / "routing.png").size) < 1500


@pytest.mark.parametrize("num_shots", [1, 3, 40])
def test_a_map_has_a_thumbnail_of_each_shot_on_both_axes(tmp_path, num_shots):
    """Their colours are all different, and stand in the order of the shots."""
    blues = np.linspace(60, 240, num_shots).round().astype(int)
    pictures = [np.full((36, 64, 3), (0, 60, blue), np.uint8) for blue in blues]
    draw_routing_map(tmp_path / "routing.png", torch.zeros(num_shots, num_shots, dtype=torch.float64), pictures)
    image = np.asarray(Image.open(tmp_path / "routing.png").convert("RGB")).astype(int)
    green = (image[..., 0] < 8) & (abs(image[..., 1] - 60) < 8)
    rows, columns = np.nonzero(green)
    left, below = (
        green & (np.arange(image.shape[1]) < columns.mean()),
        green & (np.arange(len(image))[:, None] > rows.max() - 2),
    )
    down = image[np.nonzero(left.any(1))[0], columns.min() + 1, 2]
    along = image[rows.max() - 1, np.nonzero(below.any(0))[0], 2]
    for line in (down[: len(down) // 2], along):
        assert (np.diff(line) >= -2).all()
    assert len(np.unique(along)) >= num_shots


@pytest.mark.parametrize("num_shots", [1, 6])
def test_the_routing_map_sets_own_shots_apart(tmp_path, num_shots):
    shares = torch.zeros(num_shots, num_shots, dtype=torch.float64)
    for shot in range(1, num_shots):
        shares[shot, :shot] = 1 / shot
    draw_routing_map(tmp_path / "routing.png", shares)
    image = Image.open(tmp_path / "routing.png")
    assert min(image.size) > 300
    diagonal = colour_share(image, (0xB8, 0xC4, 0xD6))
    square = colour_share(image, tuple(int(255 * c) for c in (0.001462, 0.000466, 0.013866)))  # a share of 1
    assert diagonal > 0.01
    if num_shots == 6:
        assert square > 0.2 * diagonal / num_shots
