"""Films are judged from their pictures: names that keep their looks, cuts, motion and drift of known size, reports."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

from data.errors import DataError
from data.media.write import join_videos, write_video
from data.prepare.shots import build_detector
from evaluation.films.consistency import Consistency, fidelity, returns, within
from evaluation.films.cuts import cut_accuracy
from evaluation.films.features import Clip, ColourHistogram, Dino
from evaluation.films.scores import average, cuts, measure, scores
from evaluation.films.shown import Film, ShownShot, names_by_shot, open_film, read_schedule
from evaluation.films.speed_and_drift import appearance, drift, speed
from film.folder import FilmFolder, FilmProgress
from film.request import REQUEST
from film.script import load_script
from film.storyboard import pick_frames
from moc.errors import UserError
from tests import pipeline

RED, BLUE, GREEN = (200, 40, 40), (40, 40, 200), (40, 180, 60)
CPU = torch.device("cpu")


def picture(colour, at: int = 10, background: int = 120) -> np.ndarray:
    """Returns a textured square of a colour on grey, 64 x 96."""
    out = np.full((64, 96, 3), background, np.uint8)
    texture = np.random.default_rng(0).integers(-30, 30, (24, 24, 1))
    out[20:44, at : at + 24] = np.clip(np.array(colour) + texture, 0, 255)
    return out


def write_film(folder: Path, shots: list[tuple[str, list[np.ndarray]]]) -> Path:
    """Returns a folder as sample.py leaves it, of (prompt, frames) a shot, at 12 fps."""
    for number, (_, frames) in enumerate(shots, start=1):
        write_video(folder / f"shots/{number:02d}.mp4", frames, 12)
    join_videos(folder / "video.mp4", [folder / f"shots/{number:02d}.mp4" for number in range(1, len(shots) + 1)])
    told = [{"prompt": prompt, "seconds": len(frames) / 12, "cut": True} for prompt, frames in shots]
    script = {"title": "t", "global": "[character] Mia: red. Gus: blue, <b>bold</b>. [story] None.", "size": [64, 96]}
    told_script = script | {"fps": 12, "negative": "", "shots": told}
    record = dict.fromkeys(REQUEST) | {"moc": {}, "sampler": {}, "script": told_script}
    (folder / "metadata.json").write_text(json.dumps(record))
    return folder


def story(folder: Path, looks: dict[str, tuple], prompts=("Mia walks.", "Gus sits.", "Mia <i>runs</i>.", "Gus again.")):
    return write_film(folder, [(p, [picture(looks[p.split()[0]], 10 + i) for i in range(8)]) for p in prompts])


def consistency(film: Film, features=None, clip=None) -> Consistency:
    """Returns that of a film by one kind of features, as it is measured."""
    found = measure(film, [features or ColourHistogram()], clip, build_detector("adaptive"))
    return found.consistency[0]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Returns names that keep their looks; and looks that come back under the other's name."""
    root = tmp_path_factory.mktemp("films")
    true = story(root / "true", {"Mia": RED, "Gus": BLUE})
    mixed = [("Mia walks.", RED), ("Gus sits.", BLUE), ("Mia runs.", BLUE), ("Gus again.", RED)]
    mixed = write_film(root / "mixed", [(prompt, [picture(look)] * 8) for prompt, look in mixed])
    return {"true": true, "mixed": mixed}


def test_names_come_from_the_global_caption_or_a_schedule(films, tmp_path):
    script = load_script(films["true"] / "metadata.json")
    assert names_by_shot(script) == [{"Mia"}, {"Gus"}, {"Mia"}, {"Gus"}]
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"shots": [["a"], ["a", "b"], [], ["b"]]}, indent="\t"))  # no YAML has tabs
    assert [shot.names for shot in open_film(films["true"], read_schedule(file)).shots] == [
        {"a"},
        {"a", "b"},
        set(),
        {"b"},
    ]
    entities = ({"characters": ["Ann", "Bob"], "places": ["hall"]}, None, {"characters": ["Ann"]})
    city = replace(script, shots=[replace(script.shots[0], prompt="Miami at night.")])
    assert names_by_shot(city) == [set()]
    told = replace(script, shots=[replace(script.shots[0], entities=one) for one in entities])
    assert names_by_shot(told) == [{"Ann", "Bob", "hall"}, set(), {"Ann"}]
    with pytest.raises(DataError, match="4 shots, the schedule 1"):
        open_film(films["true"], [["a"]])
    other = tmp_path / "schedule.yaml"
    other.write_text("shots: [[a], b]")
    with pytest.raises(DataError, match=r"shots\[1\].*'b' is not a list of names"):
        read_schedule(other)
    with pytest.raises(DataError, match="no whole film"):
        open_film(tmp_path)


def test_a_film_with_a_damaged_shot_is_named(tmp_path):
    film = write_film(tmp_path / "film", [("Mia walks.", [picture(RED)] * 8)])
    shot = film / "shots/01.mp4"
    shot.write_bytes(shot.read_bytes()[:500])
    with pytest.raises(DataError, match=r"shots/01\.mp4: is not what was written"):
        open_film(film)


def test_a_name_is_compared_with_the_last_shot_that_showed_it():
    shots = [frozenset(names) for names in ("a", "b", "ab", "", "a")]
    assert returns(shots) == [(0, 2), (1, 2), (2, 4)]


def test_looks_that_keep_to_their_name_are_told_from_those_that_change(films):
    found = {name: consistency(open_film(folder)) for name, folder in films.items()}
    assert [distance for distance, _ in found["true"].same] == [2, 2]
    assert len(found["true"].different) == 4
    gain = {
        name: np.mean([similarity for _, similarity in one.same]) - np.mean(one.different)
        for name, one in found.items()
    }
    assert gain["true"] > 0.03
    assert gain["mixed"] < -0.03
    assert min(found["true"].intra) > 0.9


def test_blank_shots_are_not_compared(tmp_path):
    frames, blue = [picture(RED)] * 8, np.full((64, 96, 3), BLUE, np.uint8)
    film = write_film(tmp_path, [("Mia.", frames), ("Mia.", [blue] * 8), ("Mia.", frames)])
    found = consistency(open_film(film))
    assert found.admitted == [True, False, True]
    assert [distance for distance, _ in found.same] == [2]
    assert found.different == []  # a blank shot shows nobody


def test_a_shot_is_what_its_pictures_are_on_average(films):
    """Shots of the same two pictures are alike, however far these lie apart."""

    class Halves:
        name = "halves"

        def images(self, pictures: np.ndarray) -> torch.Tensor:
            return torch.eye(2).repeat_interleave(len(pictures) // 2, dim=0)

    found = consistency(open_film(films["true"]), Halves())
    assert [similarity for _, similarity in found.same] == pytest.approx([1.0, 1.0])


def test_a_shot_fits_its_prompt_better_than_other_prompts_do(films):
    """The second shot fits the first one's prompt better than its own. A film of one shot has no other prompts."""
    film = open_film(films["true"])
    scores = torch.tensor([[0.5, 0.1], [0.9, 0.6]])
    assert fidelity(replace(film, shots=film.shots[:2]), scores).admitted == [True, False]
    one = fidelity(replace(film, shots=film.shots[:1]), scores[:1, :1])
    assert (one.admitted, one.rule) == ([True], "not blank")


class NamesOfColours:
    """This CLIP knows Mia as red and Gus as blue."""

    name, seen = "a stand-in", 0

    def images(self, pictures: np.ndarray) -> torch.Tensor:
        self.seen += len(pictures)
        red, _, blue = torch.from_numpy(pictures).float().mean((0, 1, 2))
        return torch.eye(2)[[int(blue > red)] * len(pictures)]

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.eye(2)[[int("Gus" in text) for text in texts]]


def test_shots_that_show_another_than_their_prompt_are_not_compared(films):
    found = {name: consistency(open_film(film), clip=NamesOfColours()) for name, film in films.items()}
    assert found["true"].admitted == [True] * 4
    assert found["mixed"].admitted == [True, True, False, False]
    assert found["mixed"].same == []


def test_each_network_sees_a_film_once(films):
    """Its features serve consistency, the gate and text alignment."""
    film, clip, other = open_film(films["true"]), NamesOfColours(), NamesOfColours()
    other.name = "another"
    found = measure(film, [other, clip], clip, build_detector("adaptive"))
    num_pictures = sum(len(shot.pictures) for shot in film.shots)
    assert (clip.seen, other.seen) == (num_pictures, num_pictures)
    assert found.alignment.tolist() == [1.0] * 4
    assert [kind.features for kind in found.consistency] == ["another", "a stand-in"]


def test_the_pictures_of_a_shot_are_spread_over_it(tmp_path):
    """Frame i has a grey of 40 + 8 i; the picture after each is the next frame's, and after the last it is the same."""
    frames = [np.full((512, 96, 3), 40 + 8 * i, np.uint8) for i in range(20)]
    first, second = open_film(write_film(tmp_path, [("a", frames), ("b", frames[:1])])).shots
    assert (first.frames, second.frames) == (20, 1)
    at = ((first.pictures.mean((1, 2, 3)) - 40) / 8).round().astype(int).tolist()
    assert at == pick_frames(19, 8)
    assert ((first.after.mean((1, 2, 3)) - 40) / 8).round().astype(int).tolist() == [i + 1 for i in at]
    assert first.pictures.shape[1:] == (256, 48, 3)
    assert (second.pictures == second.after).all()


def test_within_a_shot_pictures_are_compared_with_the_first_and_the_one_before():
    pictures = torch.eye(3)[[0, 0, 1]]
    assert within(pictures) == pytest.approx((0.5 + 0.5) / 2)
    assert within(pictures[:1]) is None


def test_motion_is_as_fast_as_it_is(tmp_path):
    texture = np.random.default_rng(0).integers(0, 255, (16, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    moving = [texture[:, 2 * i : 2 * i + 192] for i in range(8)]  # it moves 2 of 128 pixels a frame
    film = write_film(tmp_path, [("a", moving), ("b", [moving[0]] * 8), ("c", moving[:1])])
    shots = open_film(film).shots
    assert speed(shots[0], 12) == pytest.approx(12 * 2 / 128, rel=0.25)
    assert speed(shots[1], 12) < 0.01
    assert speed(shots[2], 12) == 0


def test_drift_is_the_slope_over_shots(films, tmp_path):
    film = write_film(tmp_path, [("a", [np.full((64, 96, 3), 100 + 10 * i, np.uint8)] * 4) for i in range(5)])
    slopes = drift(open_film(film))
    assert slopes["brightness"][0] == pytest.approx(10 / 120, rel=0.05)
    assert slopes["brightness"][1] < 0.01
    assert drift(open_film(write_film(tmp_path / "short", [("a", [picture(RED)] * 4)] * 2))) == {}


def test_appearance_is_of_brightness_contrast_and_colour():
    half_white = np.zeros((1, 64, 96, 3), np.uint8)
    half_white[:, :, 48:] = 255
    red = np.full((1, 64, 96, 3), (255, 0, 0), np.uint8)
    grey, coloured = (appearance(ShownShot("a", True, 1, x, x, frozenset())) for x in (half_white, red))
    assert (grey["brightness"], grey["contrast"], grey["saturation"]) == pytest.approx((0.5, 0.5, 0.0))
    assert (coloured["brightness"], coloured["contrast"], coloured["saturation"]) == pytest.approx((1.0, 0.0, 1.0))
    assert grey["sharpness"] > coloured["sharpness"] == 0


def test_films_without_a_measure_leave_it_to_the_others(films):
    """A film of two shots has no drift; what is 0 counts, and what is not a number does not."""
    found = measure(open_film(films["true"]), [ColourHistogram()], None, build_detector("adaptive"))
    assert scores("two", [replace(found, drift={}), found])["drift"] == scores("one", [found])["drift"]
    assert average([0.0, 1.0, math.nan]) == 0.5
    assert average([math.nan]) is None


def test_cuts_tell_how_many_frames_they_are_off():
    assert cut_accuracy([9, 21, 40], [10, 20], 60).deviation == 1
    assert np.isnan(cut_accuracy([], [10], 60).deviation)


class EightFrames:
    """This detector finds a shot in every eight frames."""

    name = "eight frames"

    def finder(self):
        return self

    def see(self, frame) -> None:
        pass

    def spans(self):
        return [(start, start + 8) for start in range(0, 32, 8)]


def test_a_films_scripted_cuts_are_where_its_later_shots_begin_with_one(films):
    """The first shot has no cut before it, and the third one goes on from the second."""
    film = open_film(films["true"])
    shots = [replace(shot, cut=number != 3) for number, shot in enumerate(film.shots, start=1)]
    found = cuts(replace(film, shots=shots), EightFrames())
    assert (found.precision, found.recall, found.deviation) == (pytest.approx(2 / 3), 1, 0)


def test_local_weights_are_used(films, tmp_path):
    """These are tiny models of DINOv2's and CLIP's classes, with random weights."""
    torch.manual_seed(0)
    folder, sizes = tmp_path / "clip", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, mlp_ratio=1, **sizes)).save_pretrained(tmp_path / "dino")
    words = ["<pad>", "</s>", "mia", "gus", "walks", "sits", "runs", "again", "."]
    sizes |= {"intermediate_size": 16}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 6, "eos_token_id": 1, "pad_token_id": 0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"crop_size": {"height": 32, "width": 32}}')
    film = open_film(films["true"])
    clip = Clip(str(folder), CPU)
    for features in (Dino(str(tmp_path / "dino"), CPU), clip):
        seen = features.images(film.shots[0].pictures)
        assert seen.norm(dim=1).tolist() == pytest.approx([1] * len(seen))
        assert features.is_published
    assert clip.texts(["mia walks . " * 9, "gus"]).shape == (2, 8)
    found = consistency(film, clip, clip)
    assert "its own prompt" in found.gate
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../dino/model.safetensors"}}')
    with pytest.raises(UserError, match="is no index of its own shards"):
        Clip(str(folder), CPU)
    for kind in (Dino, Clip):
        with pytest.raises(UserError, match="no folder with weights"):
            kind(str(tmp_path / "nothing"), CPU)
        with pytest.raises(UserError, match="no model that transformers loads"):
            kind(str(films["true"]), CPU)


def test_films_are_evaluated_side_by_side(films, tmp_path, capsys):
    output, page = tmp_path / "scores.json", tmp_path / "page.html"
    named = f"films=[{films['true']},{films['mixed']}]"
    pipeline.command("scripts/evaluate.py", named, f"output={output}", f"page={page}", "device=cpu")
    record = json.loads(output.read_text())
    true, mixed = record["films"]
    assert true["consistency"][0]["same_minus_other"]["mean"] > 0 > mixed["consistency"][0]["same_minus_other"]["mean"]
    assert true["consistency"][0]["by_distance"]["2"]["count"] == 2
    assert true["text_alignment"] is None
    assert set(true["cuts"]) == {"score", "precision", "recall", "deviation"}
    assert record["vbench"] == {str(folder): {} for folder in films.values()}
    text = page.read_text()
    assert "Mia &lt;i&gt;runs&lt;/i&gt;." in text
    assert "<i>" not in text
    assert text.count("data:image/jpeg;base64,") == 2 * 4 * 3
    assert "not measured" in text
    said = capsys.readouterr().out
    assert "vbench evaluate" in said
    assert re.search(r"true: 1 film, 4 shots, [\d.]+ s\n  cuts found of the scripted \d", said)
    assert re.search(r"\n  colour histogram: within shots .* difference 0\.\d+\n", said)
    assert "±" not in said  # no film has five shots, or five pairs of them
    assert "Where there are 5 or more, ± is half" in text
    assert "±" not in text.partition("<table>")[2]
    pipeline.assert_one_message(
        pipeline.refusal(capsys, "scripts/evaluate.py", "device=cpu"), "checkpoint=PATH", "films="
    )
    said = pipeline.refusal(capsys, "scripts/evaluate.py", named, "vbench=[x]", "device=cpu")
    pipeline.assert_one_message(said, "vbench has 1 results for 2 films")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("output={0}", "is a folder; name a file"),
        ("page={0}/file/page.html", "cannot be written"),
        ("vbench=[{0}/none]", "is no result of VBench"),
    ],
)
def test_what_cannot_be_written_or_read_is_refused_before_films_are_judged(tmp_path, capsys, where, said):
    (tmp_path / "file").touch()
    arguments = (f"films=[{tmp_path / 'no film'}]", where.format(tmp_path))
    pipeline.assert_one_message(pipeline.refusal(capsys, "scripts/evaluate.py", *arguments), said)


def test_a_film_that_was_sampled_is_evaluated_with_its_checkpoint(trained, prepared, tmp_path):
    story = tmp_path / "story.json"
    prompts = ("In the meadow, Mia walks.", "In the reef, Gus waves.")
    shots = [{"prompt": prompt, "seconds": 0.5} for prompt in prompts]
    script = {"global": "[character] Mia: a rabbit. Gus: a frog.", "size": [32, 48], "fps": 12, "shots": shots}
    story.write_text(json.dumps(script))
    film, output = pipeline.sample(trained, story, tmp_path / "film", "device=cpu"), tmp_path / "scores.json"
    arguments = (f"checkpoint={trained}", f"data.path={prepared}", "data.validation=1", f"films=[{film}]", "device=cpu")
    pipeline.command("scripts/evaluate.py", *arguments, f"output={output}", f"page={tmp_path / 'page.html'}")
    record = json.loads(output.read_text())
    assert len(record["losses"]) == 6
    (scores,) = record["films"]
    assert (scores["shots"], scores["drift"]) == (2, {})
    assert scores["consistency"][0]["other_name"]["count"] == 1


def test_films_of_a_folder_are_taken_together(films, tmp_path):
    root, output, page = films["true"].parent, tmp_path / "scores.json", tmp_path / "page.html"
    arguments = (f"films=[{root},{films['true']}]", f"output={output}", f"page={page}", "device=cpu")
    pipeline.command("scripts/evaluate.py", *arguments)
    both, one = json.loads(output.read_text())["films"]
    assert [(row["films"], row["shots"]) for row in (both, one)] == [(2, 8), (1, 4)]
    assert both["consistency"][0]["same_name"]["count"] == 4
    assert both["consistency"][0]["same_minus_other"]["mean"] < one["consistency"][0]["same_minus_other"]["mean"]
    assert both["drift"]["brightness"]["p"] is None
    assert one["drift"]["brightness"]["p"] is not None
    assert page.read_text().count("data:image/jpeg;base64,") == 3 * 4 * 3


def test_films_that_are_not_whole_are_named_before_any_is_judged(films, tmp_path, monkeypatch, capsys):
    begun = shutil.copytree(films["true"], tmp_path / "films/begun")
    FilmFolder(begun).keep(FilmFolder(begun).read_metadata(), FilmProgress(0, {}, [], {}))
    shutil.copytree(films["true"], tmp_path / "films/done")
    again = shutil.copytree(begun, tmp_path / "films/again")
    monkeypatch.setattr("evaluation.evaluate.measure", lambda *_: pytest.fail("a film was judged"))
    arguments = (f"films=[{films['true']},{tmp_path / 'films'},{tmp_path / 'none'}]", "device=cpu")
    said = pipeline.refusal(capsys, "scripts/evaluate.py", *arguments)
    wrong = [f"{folder}: holds no whole film" for folder in (begun, again, tmp_path / "none")]
    pipeline.assert_refused(said, *wrong)
