"""These tests are about a folder of scripts and films, as the app uses it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import film.studio as studio_module
from film.filmmaker import Filmmaker
from film.studio import Studio
from moc.errors import UserError

STORY = """title: A walk
size: [32, 48]
fps: 12
shots:
  - {prompt: "Mia walks.", seconds: 0.34}
  - {prompt: "Mia waves.", seconds: 0.34}
"""


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_script_is_kept_in_our_form_or_not_at_all(studio):
    text = studio.save("walk", '{"scenes": [{"video_prompts": ["A man wakes.", "Night."]}], "size": [32, 48]}')
    assert studio.names() == ["walk"]
    assert studio.text("walk") == text
    assert [shot.prompt for shot in studio.read("walk").shots] == ["A man wakes.", "Night."]
    with pytest.raises(UserError, match="there is no shot"):
        studio.save("walk", "title: none")
    assert studio.text("walk") == text
    assert files(studio.folder) == {"scripts/walk.yaml"}
    assert "2 shots" in studio.estimate("walk")


def test_a_script_is_checked_without_a_file(studio):
    """What else a person keeps beside it under its name stays as it is."""
    beside = {studio.folder / f"scripts/walk{ending}": f"title: mine {ending}" for ending in (".yml", ".json")}
    for path, text in beside.items():
        path.write_text(text)
    studio.save("walk", '{"shot_captions": ["A man wakes."], "size": [32, 48]}')
    studio.save("walk", STORY)
    with pytest.raises(UserError, match=r"walk\.json"):
        studio.save("walk", "{")
    assert {path: path.read_text() for path in beside} == beside


NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "a\0b", "x" * 65, "a.b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_in_the_folder(studio, name):
    for act in (studio.text, studio.film, studio.read, lambda name: studio.save(name, STORY)):
        with pytest.raises(UserError, match="is no name for a film"):
            act(name)
    assert files(studio.folder) == set()


def test_links_and_pictures_do_not_lead_out_of_the_folder(studio, tmp_path):
    (tmp_path / "secret.yaml").write_text(STORY)
    (studio.folder / "scripts/link.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(UserError, match="does not lie within"):
        studio.text("link")
    with pytest.raises(UserError, match="outside"):
        studio.save("walk", STORY.replace("seconds: 0.34}", "image: ../../secret.png}", 1))


def test_a_film_is_made_step_by_step_and_stopped_and_goes_on(studio, in_step):
    studio.save("walk", STORY)
    making = studio.make("walk")
    states = [next(making) for _ in range(5)]
    assert states[0].done == 0
    assert 0 < states[-1].done < 1
    making.close()
    assert not studio.film("walk").is_finished
    assert (studio.film("walk").path / ".progress.safetensors").exists()
    states = list(studio.make("walk"))
    assert states[-1].done == 1
    assert [path.name for path in states[-1].shots] == ["01.mp4", "02.mp4"]
    assert studio.film("walk").is_finished
    previews = [list(studio.preview("walk", guidance_scale=scale))[-1] for scale in (2.0, 1.0)]
    assert [preview.done for preview in previews] == [1, 1]
    made = [preview.folder.read_metadata()["sampler"] for preview in previews]
    assert [(sampler["steps"], sampler["guidance_scale"]) for sampler in made] == [(1, 2.0), (1, 1.0)]
    assert studio.film("walk").read_metadata()["sampler"]["steps"] == 3


def test_who_closes_a_film_in_the_making_ends_its_thread(studio, monkeypatch):
    """It is ended at once, and not when nobody refers to it any more: its folder is free for the next film."""
    threads, in_a_thread = [], studio_module._in_a_thread

    def noted(work):
        threads.append(in_a_thread(work))
        return threads[0]

    monkeypatch.setattr(studio_module, "_in_a_thread", noted)
    studio.save("walk", STORY)
    making = studio.make("walk")
    next(making)
    making.close()
    with pytest.raises(StopIteration):
        next(threads[0])
    with studio.film("walk").held():
        pass


def test_films_and_previews_say_how_they_were_sampled(studio):
    """The settings that the app began with are not those of a film for which others were chosen."""
    studio.save("walk", STORY)
    preview, film = list(studio.preview("walk"))[-1], list(studio.make("walk", steps=2, guidance_scale=1.0))[-1]
    for state, steps, scale in ((preview, 1, 2.0), (film, 2, 1.0)):
        made = state.folder.read_metadata()
        for sampler in (made["sampler"], made["config"]["sampler"]):
            assert (sampler["steps"], sampler["guidance_scale"]) == (steps, scale)
    assert studio.filmmaker.sampler.steps == 3


def test_another_model_makes_a_preview_of_its_own(studio, trained, tmp_path):
    """An app that is opened again with another checkpoint previews the scripts that are there."""
    studio.save("walk", STORY)
    first = list(studio.preview("walk"))[-1].folder
    config = replace(studio.filmmaker.config, shift=2.0)
    second = list(Studio(Filmmaker(config), studio.folder, preview_steps=1).preview("walk"))[-1].folder
    assert first.path != second.path
    assert first.read_latent(1).shape == second.read_latent(1).shape
    assert list(studio.preview("walk"))[-1].folder.path == first.path


def test_a_shot_is_made_anew_and_its_takes_compared(studio):
    studio.save("walk", STORY)
    with pytest.raises(UserError, match="not filmed to its end"):
        studio.redo("walk", 2, "Mia jumps.", 5)
    list(studio.make("walk"))
    first = studio.film("walk").shot(1).read_bytes(), studio.film("walk").shot(2).read_bytes()
    for prompt, seed in (("Mia jumps.", 4), ("Mia jumps.", 9)):
        list(studio.redo("walk", 2, prompt, seed))
    takes = studio.takes("walk", 2)
    assert [path.parent.name for path in takes] == ["takes", "takes", "shots"]
    assert takes[0].read_bytes() == first[1]
    assert len({path.read_bytes() for path in takes}) == 3
    assert studio.film("walk").shot(1).read_bytes() == first[0]
    assert studio.before("walk", 2) == ("Mia jumps.", 4)
    with pytest.raises(UserError, match="shot 1 of walk has no take before"):
        studio.before("walk", 1)
    shot = studio.read("walk").shots[1]
    assert (shot.prompt, shot.seed) == ("Mia jumps.", 9)
    with pytest.raises(UserError, match="asked to be what it is"):
        studio.redo("walk", 2, "Mia jumps.", 9)
    assert len(studio.takes("walk", 2)) == 3
    for number, prompt, said in ((3, "x", "shots 1 to 2"), (1, " ", "prompt is empty")):
        with pytest.raises(UserError, match=said):
            studio.redo("walk", number, prompt, 1)
    with pytest.raises(UserError, match=r"walk shots\[1\]\.seed: 4294967296 is not a whole number"):
        studio.redo("walk", 2, "Mia jumps.", 2**32)
    list(studio.redo("walk", 2, *studio.before("walk", 2)))
    assert studio.film("walk").shot(2).read_bytes() == takes[1].read_bytes()


def test_takes_are_in_the_order_of_their_numbers(studio):
    folder = studio.film("walk").path / "takes"
    folder.mkdir(parents=True)
    for number in range(11):
        (folder / f"02_{number}.mp4").touch()
    assert [path.stem for path in studio.takes("walk", 2)] == [f"02_{number}" for number in range(11)]


def test_what_cannot_be_made_anew_leaves_script_and_takes(studio, tmp_path):
    """A given video is no shot that is made, and a longer script is another film's."""
    studio.save("walk", STORY)
    list(studio.make("walk"))
    shutil.copy(studio.film("walk").shot(1), studio.folder / "scripts/take.mp4")
    studio.save("told", STORY.replace('"Mia walks."', '"Mia walks.", video: take.mp4'))
    list(studio.make("told"))
    studio.save("walk", STORY + '  - {prompt: "Mia runs.", seconds: 0.34}\n')
    for name, number, said in (
        ("told", 1, "shot 1 is a given video"),
        ("walk", 2, "holds another film"),
        ("walk", 3, "no 3"),
    ):
        before = studio.text(name)
        with pytest.raises(UserError, match=said):
            studio.redo(name, number, "Mia jumps.", 5)
        assert studio.text(name) == before
        assert not list(studio.film(name).path.glob("takes/*"))


def test_a_film_of_another_script_is_set_aside(studio):
    """Nothing is lost: not the film of the script before, nor one that was stopped."""
    name = "w" * 64  # the longest name allowed
    studio.save(name, STORY)
    list(studio.make(name))
    made = studio.film(name).shot(1).read_bytes()
    studio.save(name, STORY.replace("Mia walks.", "Mia runs."))
    making = studio.make(name)
    assert [next(making).num_shots for _ in range(4)] == [2] * 4
    making.close()
    list(studio.make(name))  # making continues
    studio.save(name, STORY)
    list(studio.make(name))
    assert studio.film(name).shot(1).read_bytes() == made
    assert sorted(path.name for path in (studio.folder / "earlier").iterdir()) == [f"{name}_1", f"{name}_2"]
    assert (studio.folder / f"earlier/{name}_1/shots/01.mp4").read_bytes() == made
    assert (studio.folder / f"earlier/{name}_2/video.mp4").exists()


def test_a_shot_is_made_anew_with_the_settings_of_its_film(studio):
    studio.save("walk", STORY)
    assert studio.estimate("walk", steps=1) != studio.estimate("walk", steps=1, guidance_scale=1.0)
    list(studio.make("walk", steps=1, guidance_scale=1.0))
    list(studio.redo("walk", 2, "Mia jumps.", 4))
    made = studio.film("walk").read_metadata()
    assert (made["sampler"]["steps"], made["sampler"]["guidance_scale"], made["redone"]) == (1, 1.0, [2])
    with pytest.raises(UserError, match="steps=0"):
        studio.make("walk", steps=0)


def test_pictures_are_added_and_none_is_replaced(studio, tmp_path):
    (tmp_path / "ann.png").write_bytes(b"one")
    assert studio.add(tmp_path / "ann.png") == studio.add(tmp_path / "ann.png") == "ann.png"
    (tmp_path / "ann.png").write_bytes(b"two")
    with pytest.raises(UserError, match="there is another ann"):
        studio.add(tmp_path / "ann.png")
    (tmp_path / "walk.yaml").write_text(STORY)
    with pytest.raises(UserError, match="no picture or video"):
        studio.add(tmp_path / "walk.yaml")
    assert (studio.folder / "scripts/ann.png").read_bytes() == b"one"
    assert files(studio.folder) == {"scripts/ann.png"}


def test_a_preview_shares_what_is_loaded(studio):
    """Deriving a filmmaker loads nothing; what either loads is the other's too."""
    filmmaker = studio.filmmaker
    quick = filmmaker.with_sampler(steps=1)
    assert (quick.sampler.steps, filmmaker.sampler.steps) == (1, 3)
    assert not filmmaker.shared
    assert quick.model is filmmaker.model
    assert filmmaker.encoders is quick.encoders
    assert quick.fingerprints is filmmaker.fingerprints
    assert filmmaker.with_sampler(steps=2).moc is quick.moc


def test_what_fails_while_filming_is_told(studio, monkeypatch):
    studio.save("walk", STORY)
    monkeypatch.setattr(studio.filmmaker, "make", lambda *_: (_ for _ in ()).throw(UserError("no memory")))
    with pytest.raises(UserError, match="no memory"):
        list(studio.make("walk"))
