"""The page of a film says what was filmed, how and at what cost, and needs nothing but the film's folder."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from film import page
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.folder import FilmFolder
from film.plan import plan_film
from film.script import ScriptShot
from moc import MoCConfig
from moc.diffusion import SamplingConfig
from tests.film.made_up import MeanCodec, script

EVIL = '</script><script>alert("x")</script> & 兔子'
SHOT = {"prompt": "Mia walks.", "seconds": 4 / 12}
STORY = {
    "title": "A <b>journey</b>",
    "global": "Mia, 兔子.",
    "size": [32, 48],
    "fps": 12,
    "shots": [SHOT, SHOT | {"cut": False, "prompt": EVIL}, SHOT | {"seed": 5}],
}


class Page(HTMLParser):
    """This parser keeps what a page links to and shows as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "poster", "action")]

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def film(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "story.json").write_text(json.dumps(STORY))
    config = FilmmakerConfig(str(trained), device="cpu", sampler=SamplingConfig(steps=3, guidance_scale=2.0))
    filmmaker, made = Filmmaker(config), FilmFolder(folder / "film")
    filmmaker.make([(filmmaker.read(folder / "story.json"), made)])
    return made


def test_a_page_links_to_its_folder_and_nothing_else(film):
    text = (film.path / "index.html").read_text()
    links = Page(text).links
    files = [link for link in links if not link.startswith("data:")]
    assert {"video.mp4", "shots/03.mp4", "storyboard.png", "metadata.json"} <= set(files)
    assert all((film.path / file).is_file() for file in files)
    # The first shot's picture stands there twice.
    assert len([link for link in links if link.startswith("data:image/jpeg;base64,")]) == 4
    video = base64.b64encode((film.path / "video.mp4").read_bytes()).decode()
    assert f"data:video/mp4;base64,{video}" in links
    for word in ("http:", "https:", "@import", "fetch(", "XMLHttpRequest"):
        assert word not in text
    assert not re.search(r"url\((?!\"\$\{)", text)


def test_the_strip_of_shots_is_as_wide_as_the_film(film):
    """Shares of its width below 1 in sum leave a part of it empty, as seconds of a short film are."""
    shares = re.findall(r"flex: ([0-9.]+) 1 0", (film.path / "index.html").read_text())
    assert list(map(float, shares)) == [film.num_frames(number) for number in (1, 2, 3)]


def test_a_long_film_lies_beside_its_page(film, monkeypatch):
    monkeypatch.setattr(page, "_MOST_WITHIN", (film.path / "video.mp4").stat().st_size - 1)
    assert page._film(film.path / "video.mp4") == "video.mp4"


def test_a_page_shows_texts_as_they_stand(film):
    text = (film.path / "index.html").read_text()
    seen = Page(text)
    assert seen.tags.count("script") == 1
    assert "b" not in seen.tags[: seen.tags.index("video")]  # the title's tag is shown as text
    assert "A <b>journey</b>" in seen.words
    assert EVIL in seen.words
    assert 'alert("x")</script>' not in text


def test_a_page_tells_cost_and_origin(film):
    seen, record = Page((film.path / "index.html").read_text()), film.read_metadata()
    words = " ".join(seen.words.split())
    for value in record["fingerprints"].values():
        assert value in words
    assert f"tokens{sum(record['estimate']['shot_tokens']):,}" in words.replace(" ", "")
    assert f"{record['estimate']['sparsity']:.0%} at the last step" in words
    assert "goes on" in words
    assert "seed 5" in words
    assert "seeds0, 5" in words.replace("seeds 0", "seeds0")
    assert f"looks to 1 ({round(100 * record['routing'][1][0])} %)" in words
    assert "each token chooses 2 chunks of about 6 tokens, earlier in the film" in words
    assert "one shot after another" in words
    assert "chunk_tokens" not in words


def test_a_page_tells_in_words_how_shots_were_sampled():
    assert page._attention(MoCConfig(dense=True).to_dict()) == "dense: each token attends to all others"
    told = page._attention(MoCConfig(top_k=1, chunk_tokens=20, causal=False).to_dict())
    assert told == "Mixture of Contexts: each token chooses 1 chunk of about 20 tokens, anywhere in the film"
    assert [page._order(lag) for lag in (0.0, 1.0)] == ["all shots at once", "one shot after another"]
    assert page._order(0.3) == "each shot begins 30% of its steps after the one before it"


def test_a_given_shot_has_no_seed_and_one_thing_is_no_plural(trained, film, tmp_path):
    """Nothing is drawn of a given shot; the metadata keep a seed for it all the same."""
    (tmp_path / "take.mp4").write_bytes(film.shot(1).read_bytes())
    shots = [SHOT | {"video": "take.mp4"}, {"prompt": "Mia waves.", "seconds": 1 / 12, "seed": 7}]
    (tmp_path / "story.json").write_text(json.dumps(STORY | {"shots": shots}))
    config = FilmmakerConfig(str(trained), device="cpu", sampler=SamplingConfig(steps=1, guidance_scale=1.0))
    filmmaker, made = Filmmaker(config), FilmFolder(tmp_path / "film")
    filmmaker.make([(filmmaker.read(tmp_path / "story.json"), made)])
    words = " ".join(Page((made.path / "index.html").read_text()).words.split())
    told = re.findall(r"(\d+ frames?) · \d+ tokens( · seed \d+)?", words)
    assert told == [("4 frames", ""), ("1 frame", " · seed 7")]
    assert "seed7Madewith" in words.replace(" ", "")
    (tmp_path / "story.json").write_text(json.dumps(STORY | {"shots": shots[1:]}))
    plan = filmmaker.plan(filmmaker.read(tmp_path / "story.json"))
    assert any(line.startswith("1 shot, 1 frame, ") for line in filmmaker.cost(plan))


def test_a_page_holds_the_routes_of_each_layer_and_noise_level(film):
    text = (film.path / "index.html").read_text()
    packed = json.loads(re.search(r"const routing = (\{.*?\});", text)[1])
    counts = film.read_routing()
    assert [packed[name] for name in ("layers", "levels", "shots")] == [2, 4, 3]
    values = np.frombuffer(base64.b64decode(packed["counts"]), "<u2").reshape(2, 4, 3, 4)
    assert not values[..., -1].any()  # the last column is for pictures, and there are none
    shown = values[..., :3] / 65535 * float(counts.max())
    assert np.abs(shown - counts.numpy()).max() <= float(counts.max()) / 65535
    assert (counts.sum((0, 2, 3)) > 0).sum() > 1  # counts are kept for each noise level
    assert (counts[:, :, 1:].sum((1, 2, 3)) > 0).all()


def test_a_shot_is_said_to_look_back_to_the_three_that_have_most_of_its_routes():
    plan = plan_film(script(*[ScriptShot("a", 0.5)] * 5), MeanCodec())
    record = {"script": {"shots": [{"seed": 0}] * 5}, "estimate": {"shot_tokens": [1] * 5}, "redone": []}
    counts = torch.zeros(1, 1, 5, 6)
    counts[0, 0, 2, :2] = torch.tensor([3.0, 997])  # less than half a percent is not told
    counts[0, 0, 4] = torch.tensor([10.0, 50, 5, 30, 0, 5])  # the last column is for pictures
    told = [shot["looks_to"] for shot in page._shots(plan, record, counts)]
    assert told == [[], [], [(2, 100)], [], [(2, 50), (4, 30), (1, 10)]]


def test_storyboards_are_in_the_order_of_their_numbers():
    names = ["storyboard.png", "storyboard_2.png", "storyboard_10.png"]
    assert sorted(names, key=page._numbered) == names


def test_routes_to_pictures_are_counted_apart():
    counts = torch.arange(1.0, 10).reshape(1, 1, 3, 3)
    assert page._counts_of_shots(counts, [0, 2]).tolist() == [[[[1, 3, 2], [7, 9, 8]]]]


def test_a_page_that_fails_costs_itself_alone(film, monkeypatch, caplog):
    (film.path / "index.html").unlink()

    def broken(*_):
        raise RuntimeError("no page today")

    film.draw("index.html", broken)
    assert not (film.path / "index.html").exists()
    assert "index.html is left out, the film is whole (RuntimeError: no page today)" in caplog.text
