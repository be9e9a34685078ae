"""These tests are about the filmmaker with a small trained model: films that are killed, films that are repeated."""

import json
import random
import shutil
import time
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image

from data.errors import DataError
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.find import find_films
from film.folder import METADATA, PROGRESS, FilmFolder
from film.script import load_script
from moc import MoCConfig
from moc.diffusion import SamplingConfig
from moc.errors import Refusals, UserError
from models.checkpoints.contents import Contents
from models.checkpoints.seen import Seen, share_without_captions
from tests.film.filming import SHOT, STORY, contents, film_of, killed_after, open_filmmaker, times_killed
from tests.pipeline import stamps, train


@pytest.mark.parametrize("lag", [0.0, 0.5, 1.0])
def test_a_film_that_is_killed_again_and_again_is_the_film_that_never_was(trained, write, tmp_path, lag):
    """Each process is killed before one more file gets its name than the one before it gave."""
    filmmaker = open_filmmaker(trained, lag=lag)
    plan = filmmaker.plan(load_script(write(STORY)))
    filmmaker.film(plan, FilmFolder(tmp_path / "whole"))
    assert times_killed(lambda: filmmaker.film(plan, FilmFolder(tmp_path / "killed"))) > 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_film_that_is_killed_at_twenty_random_moments_is_the_film_that_never_was(trained, write, tmp_path):
    """A film may be killed within a step, a file or a picture. What ends before it is killed is compared, and the next
    film begins."""
    Image.new("RGB", (48, 32), "red").save(tmp_path / "reef.png")
    shots = [SHOT, SHOT | {"cut": False}, SHOT | {"image": "reef.png"}, SHOT]
    filmmaker, moments = open_filmmaker(trained, lag=0.5, steps=6), random.Random(0)
    plan, began = filmmaker.plan(filmmaker.read(write(STORY | {"shots": shots}))), time.monotonic()
    filmmaker.film(plan, FilmFolder(tmp_path / "whole"))
    whole, duration = contents(tmp_path / "whole"), time.monotonic() - began
    kills = films = 0
    while kills < 20:
        films += 1
        folder = FilmFolder(tmp_path / f"film_{films}")
        work = partial(filmmaker.film, plan, folder)
        while kills < 20 and killed_after(moments.uniform(0, duration), work):
            kills += 1
        work()
        assert contents(folder.path) == whole


def test_a_film_is_repeated_from_its_metadata(trained, write, tmp_path):
    for name, colour in (("mia.png", "red"), ("reef.png", "blue")):
        Image.new("RGB", (48, 32), colour).save(tmp_path / name)
    references = [{"prompt": "Mia.", "image": "mia.png"}, {"prompt": "The reef.", "image": "reef.png"}]
    story = STORY | {"references": references, "shots": [SHOT, SHOT | {"image": "reef.png"}, SHOT]}
    filmmaker = open_filmmaker(trained, seed=3, context_shots=1)
    filmmaker.film(filmmaker.plan(load_script(write(story))), FilmFolder(tmp_path / "film"))
    other_seed = open_filmmaker(trained, context_shots=1)
    script = load_script(tmp_path / "film" / METADATA)
    other_seed.film(other_seed.plan(script), FilmFolder(tmp_path / "again"))
    first, again = contents(tmp_path / "film"), contents(tmp_path / "again")
    assert len([name for name in first if name.startswith("given/")]) == 2
    assert first.keys() == again.keys()
    assert all(again[name] == payload for name, payload in first.items() if name != METADATA)
    assert json.loads(again[METADATA])["script"] == json.loads(first[METADATA])["script"]


def test_shots_of_a_benchmark_are_filed_by_scene_and_shot(trained, write, tmp_path):
    shots = [SHOT | {"scene": [1, 1]}, SHOT | {"scene": [1, 2], "entities": {"characters": ["Mia"]}}]
    filmmaker = open_filmmaker(trained)
    first = film_of(filmmaker, write(STORY | {"shots": shots}), tmp_path / "ep1")
    assert first["001_001.mp4"] == first["shots/01.mp4"]
    assert first["001_002.mp4"] == first["shots/02.mp4"]
    assert json.loads(first[METADATA])["script"]["shots"][1]["entities"] == {"characters": ["Mia"]}
    shots[1] |= {"seed": 3}
    again = film_of(filmmaker, write(STORY | {"shots": shots}), tmp_path / "ep1", redo=[2])
    assert again["001_002.mp4"] == again["shots/02.mp4"] != first["001_002.mp4"]


def test_a_whole_film_is_left_as_it_is_and_another_one_is_refused(trained, write, tmp_path):
    filmmaker = open_filmmaker(trained)
    folder = FilmFolder(tmp_path / "film")
    filmmaker.film(filmmaker.plan(load_script(write(STORY))), folder)
    times = stamps(folder.path)
    filmmaker.film(filmmaker.plan(load_script(write(STORY))), folder)
    assert stamps(folder.path) == times
    other = filmmaker.plan(load_script(write(STORY | {"shots": [SHOT, SHOT | {"prompt": "Gus waves."}, SHOT]})))
    with pytest.raises(DataError, match=r"another film: its script\.shots\[1\]\.prompt is \"Mia walks\.\", not \"Gus"):
        filmmaker.film(other, folder)


def test_a_script_without_a_size_is_filmed_as_the_model_was_trained(trained, write, caplog):
    """The tiny world has samples of three shots, 32x48, in its own frame rate."""
    filmmaker = open_filmmaker(trained)
    assert (filmmaker.seen.sizes, filmmaker.seen.max_shots) == ([[32, 48]], 3)
    bare = {"shots": [SHOT] * 3}
    script = filmmaker.read(write(bare))
    assert script.size == (32, 48)
    filmmaker.tell_unseen(script)
    assert "never trained" not in caplog.text
    script = filmmaker.read(write(bare | {"size": [64, 96]}))
    assert script.size == (64, 96)
    filmmaker.tell_unseen(script)
    assert "was never trained on 64x96 (but 32x48); expect less of the film" in caplog.text
    caplog.clear()
    script = filmmaker.read(write(bare | {"size": [64, 96], "shots": [SHOT] * 4}), size=[32, 48], fps=7.5)
    assert (script.size, script.fps) == ((32, 48), 7.5)
    filmmaker.tell_unseen(script)
    (message,) = caplog.messages
    assert "4 shots (but 3 at most)" in message


def test_words_that_a_model_never_read_are_told(trained, write, caplog):
    filmmaker = open_filmmaker(trained)
    shots = [SHOT, SHOT | {"prompt": "Mia climbs 楼梯: " + " ".join("qrstuvwxyz")}]
    filmmaker.tell_unseen(filmmaker.read(write(STORY | {"shots": shots})))
    message = caplog.messages[-1]
    assert "never trained on the words 'climbs', '楼', '梯', 'q', 'r', 's', 't', 'u' and 5 more; expect" in message


def test_a_dense_model_is_told_to_have_never_seen_moc(trained, tmp_path, write, caplog):
    model = shutil.copytree(trained / "checkpoints/step_0000003/ema", tmp_path / "model")
    (model / "moc.json").unlink()
    for settings, is_told in ((MoCConfig.unset(), True), (MoCConfig.unset() | {"dense": True}, False)):
        caplog.clear()
        filmmaker = Filmmaker(FilmmakerConfig(str(model), encoders_path=str(trained), device="cpu", moc=settings))
        assert filmmaker.moc.dense != is_told
        assert ("has no moc.json" in caplog.text) == is_told


def test_guidance_that_a_model_never_learnt_is_told(trained, write, tmp_path, caplog):
    """Guidance asks for a film without captions."""
    model = shutil.copytree(trained / "checkpoints/step_0000003/ema", tmp_path / "model")
    films = next((trained / "checkpoints/step_0000003").rglob("films.json"))
    Seen(**json.loads(films.read_text()) | {"drop_captions": 0.0}).write(model)
    guided, plain = SHOT | {"guidance": 3}, SHOT | {"guidance": 1}
    for scale, shot, is_told in ((2.0, SHOT, True), (1.0, guided, True), (1.0, plain, False)):
        caplog.clear()
        sampler = SamplingConfig(guidance_scale=scale)
        filmmaker = Filmmaker(FilmmakerConfig(str(model), encoders_path=str(trained), device="cpu", sampler=sampler))
        filmmaker.tell_unseen(filmmaker.read(write(STORY | {"shots": [shot]})))
        assert ("sampler.guidance_scale=1 films without it" in caplog.text) == is_told


@pytest.mark.parametrize(
    ("dropped", "given", "scale"), [(0.0, None, 1.0), (0.1, None, 5.0), (None, None, 5.0), (0.0, 3.0, 3.0)]
)
def test_a_model_that_never_lost_a_caption_films_without_guidance(trained, write, tmp_path, dropped, given, scale):
    model = shutil.copytree(trained / "checkpoints/step_0000003/ema", tmp_path / "model")
    Seen(drop_captions=dropped).write(model)
    sampler = SamplingConfig(steps=1, guidance_scale=given)
    filmmaker = Filmmaker(FilmmakerConfig(str(model), encoders_path=str(trained), device="cpu", sampler=sampler))
    plan = filmmaker.plan(filmmaker.read(write(STORY)))
    assert filmmaker.request(plan)["sampler"]["guidance_scale"] == scale
    assert filmmaker.with_sampler(steps=2).sampler.guidance_scale == scale
    assert filmmaker.estimate(plan).forwards == (5 if scale == 1 else 10)


def test_what_a_training_began_from_tells_of_dropped_captions_too(trained, prepared, tmp_path):
    """A run that drops none is guided as before where the weights that it began from were trained to be."""
    assert Seen.read(Contents(trained)).drop_captions == 0.1
    settings = ("data.drop_captions=0", "data.validation=0", "trainer.num_steps=4")
    for name, start, share in (("on", f"resume={trained}", 0.1), ("anew", "resume=none", 0.0)):
        run = train(prepared, tmp_path / name, start, *settings)
        assert Seen.read(Contents(run)).drop_captions == share
    assert share_without_captions(0.0, tmp_path) is None
    assert share_without_captions(0.3, trained) == 0.3


def test_seen_says_nothing_where_nothing_is_known(tmp_path):
    assert Seen.read(Contents(tmp_path)) == Seen()
    assert Seen().defaults == {}
    assert Seen().unseen((480, 832), 16, 80, True) == []
    Seen([[32, 48], [48, 32]], [12, 24.5], 3, 0.0).write(tmp_path)
    seen = Seen.read(Contents(tmp_path))
    assert seen.defaults == {"size": [32, 48], "fps": 12}
    assert seen.unseen((48, 32), 24.5, 3, False) == []
    assert "dropped captions" in seen.unseen((48, 32), 24.5, 3, True)[0]
    assert seen.unseen((48, 33), 24, 4, False) == [
        "48x33 (but 32x48, 48x32)",
        "24 frames a second (but 12, 24.5)",
        "4 shots (but 3 at most)",
    ]
    (tmp_path / "films.json").write_text('{"size": 3}')
    with pytest.raises(UserError, match=r"films\.json does not say"):
        Seen.read(Contents(tmp_path))


# Several films, and what they cost


def test_a_folder_of_scripts_is_filmed_one_after_another(trained, write, tmp_path):
    (tmp_path / "scripts").mkdir()
    for name in ("b.yaml", "a.yml", "notes.txt", METADATA):
        write(STORY | {"title": name}, f"scripts/{name}")
    found = find_films(tmp_path / "scripts", tmp_path / "films", refusals := Refusals())
    assert [(path.name, folder.path.name) for path, folder in found] == [("a.yml", "a"), ("b.yaml", "b")]
    filmmaker = open_filmmaker(trained)
    filmmaker.make([(filmmaker.read(path), folder) for path, folder in found])
    films = [json.loads((tmp_path / "films" / name / METADATA).read_text()) for name in "ab"]
    assert [film["script"]["title"] for film in films] == ["a.yml", "b.yaml"]
    write(STORY, "scripts/a.json")
    with pytest.raises(DataError, match="two scripts named a"):
        find_films(tmp_path / "scripts", tmp_path / "films", refusals)
    with pytest.raises(DataError, match="holds no script"):
        find_films(tmp_path / "films", tmp_path / "other", refusals)
    refusals.tell()


def test_all_films_of_a_batch_without_a_folder_are_named_at_once(write, tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "films/b/shots").mkdir(parents=True)
    for name in "abc":
        write(STORY, f"scripts/{name}.yaml")
    (tmp_path / "films/a").touch()
    (tmp_path / "films/b/shots/01.mp4").touch()
    found = find_films(tmp_path / "scripts", tmp_path / "films", refusals := Refusals())
    assert [path.name for path, _ in found] == ["c.yaml"]
    with pytest.raises(UserError, match=r"2 are refused:\n.*films/a: is a file.*\n.*films/b: already holds shots"):
        refusals.tell()


def said_at_ctrl_c(filmmaker, films, redo=(), at=1) -> str:
    """Returns what Ctrl-C says besides that it came, at a step of the last film."""
    steps, last = iter(range(1, 100)), films[-1][1]

    def watch(_):
        if (last.path / PROGRESS).exists() and next(steps) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        filmmaker.make(films, redo, watch)
    return str(raised.value)


def test_ctrl_c_says_that_the_command_goes_on_where_it_kept_anything(trained, write, tmp_path):
    filmmaker = open_filmmaker(trained)
    rare, script = Filmmaker(replace(filmmaker.config, keep_every=2)), filmmaker.read(write(STORY))
    films = [(script, FilmFolder(tmp_path / name)) for name in ("one", "two")]
    assert said_at_ctrl_c(rare, films[:1], at=1) == ""  # its first step is not kept
    assert films[0][1].request() is None
    assert said_at_ctrl_c(rare, films[:1], at=2) == "the same command goes on"
    assert said_at_ctrl_c(rare, films, at=1) == "the same command goes on"  # the first film is whole
    filmmaker.make(films)
    assert said_at_ctrl_c(filmmaker.with_sampler(seed=1), films[:1], redo=[2]) == "the same command goes on"
    filmmaker.with_sampler(seed=1).make(films[:1], [2])
    # The same command would make shot 2 of the first film anew once more.
    assert said_at_ctrl_c(filmmaker.with_sampler(seed=2), films, redo=[2]) == ""


def test_processes_share_the_films_of_a_batch(trained, write, tmp_path, monkeypatch):
    filmmaker, made = open_filmmaker(trained), []
    monkeypatch.setattr(filmmaker, "film", lambda plan, folder, *_: made.append(folder.path.name))
    films = [(filmmaker.read(write(STORY)), FilmFolder(tmp_path / name)) for name in "abcde"]
    monkeypatch.setattr(filmmaker.parallel, "num_teams", 2)
    for team in (0, 1):
        monkeypatch.setattr(filmmaker.parallel, "team", team)
        filmmaker.make(films)
    assert made == ["a", "c", "e", "b", "d"]


def test_blocks_wait_in_the_host_and_the_film_is_the_same(trained, write, tmp_path):
    films = []
    for count in (0, 2):
        sampler = SamplingConfig(steps=2)
        filmmaker = Filmmaker(FilmmakerConfig(str(trained), device="cpu", swap_blocks=count, sampler=sampler))
        film_of(filmmaker, write(STORY), tmp_path / str(count))
        films.append([(tmp_path / str(count) / f"latents/0{n}.safetensors").read_bytes() for n in (1, 2, 3)])
    assert films[0] == films[1]
    for wrong, message in (
        ({"swap_blocks": 3}, "swap_blocks=3 is more than the model's 2 blocks"),
        ({"swap_blocks": 1, "offload": True}, "set one of them"),
    ):
        with pytest.raises(UserError, match=message):
            film_of(Filmmaker(FilmmakerConfig(str(trained), device="cpu", **wrong)), write(STORY), tmp_path / "other")
