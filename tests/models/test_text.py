"""These tests are about text encoders: what captions become."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from moc.errors import UserError
from models.encoders.text import (
    EmbeddedTextEncoder,
    PromptForm,
    T5TextEncoder,
    TextConfig,
    TextKind,
    build_text_encoder,
    clean,
    join_prompt,
)
from tests.weights import randomized

WORDS = ["a", "the", "in", "with", "red", "mira", "tobi", "walks", "harbor", "forest", "dog"]


@pytest.fixture(scope="module")
def embedded() -> EmbeddedTextEncoder:
    return EmbeddedTextEncoder(WORDS)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umt5")
    letters = [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]0123456789.,"]
    pieces = [(f"▁{word}", -1.0) for word in (*WORDS, "fox", "Mira")]
    T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -3.0), *pieces, *letters], extra_ids=0
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(folder)
    return folder


def test_known_words_are_one_token_and_any_other_text_is_spelled(embedded: EmbeddedTextEncoder) -> None:
    assert embedded.tokenizer.encode("Mira walks").tokens == ["mira", "walks"]
    spelled = embedded.tokenizer.encode("A redder Zebra-42, naïve?").tokens
    assert spelled[:5] == ["a", "red", "##d", "##e", "##r"]
    assert "[UNK]" not in spelled


def test_words_that_mean_nothing_to_an_encoder_are_named(embedded: EmbeddedTextEncoder) -> None:
    captions = ['Mira walks; "the Harbor"!', "Ann's 3 dogs walk in 雪.", "The DOG: Ann (a–b) 🎬"]
    assert embedded.unknown_words(captions) == ["ann", "s", "3", "dogs", "walk", "雪", "b", "🎬"]
    assert embedded.unknown_words(["", "a dog"]) == []


def test_captions_differ_clearly_by_name(embedded: EmbeddedTextEncoder) -> None:
    captions = [f"{name} walks in the {place}" for name in ("Mira", "Tobi") for place in ("harbor", "forest")]
    features = embedded.encode("", captions)[1:]
    pooled = torch.stack([x.mean(0) for x in features])
    distances = torch.cdist(pooled, pooled)[~torch.eye(4, dtype=torch.bool)]
    assert distances.min() > 0.2 * pooled.norm(dim=1).max()
    similar = torch.cosine_similarity(features[0], features[2], dim=-1)
    assert similar[0] < 0.3  # the name differs
    assert similar[1:].min() > 0.9  # the other words stay themselves


def test_captions_encoded_at_once_have_the_features_of_each_alone(embedded: EmbeddedTextEncoder) -> None:
    captions = ["Mira walks", "", "the harbor", "Mira walks in the harbor", "the dog"]
    alone = [embedded.encode(caption, [])[0] for caption in captions]
    torch.testing.assert_close(embedded.encode_each(captions), alone, rtol=0, atol=1e-5)
    assert embedded.encode_each([]) == []


def test_an_absent_caption_has_null_features(embedded: EmbeddedTextEncoder) -> None:
    null, caption = embedded.encode("", ["the dog"])
    assert null.shape == (1, 128)
    assert caption.shape == (3, 128)


def test_weights_are_seeded_and_leave_the_random_state_alone(embedded: EmbeddedTextEncoder) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = EmbeddedTextEncoder(reversed(WORDS))
    assert torch.equal(torch.rand(3), expected)
    assert again.fingerprint == embedded.fingerprint
    assert EmbeddedTextEncoder(WORDS, TextConfig(seed=1)).fingerprint != embedded.fingerprint
    assert EmbeddedTextEncoder([*WORDS, "cat"]).fingerprint != embedded.fingerprint


def test_the_encoder_is_rebuilt_from_its_folder(embedded: EmbeddedTextEncoder, tmp_path: Path) -> None:
    embedded.save(tmp_path)
    loaded = build_text_encoder(TextConfig(path=str(tmp_path)))
    assert torch.equal(loaded.encode("", ["the red dog"])[1], embedded.encode("", ["the red dog"])[1])
    (tmp_path / "vocabulary.txt").write_text("other\n")
    with pytest.raises(UserError, match="text encoder built here"):
        EmbeddedTextEncoder.load(tmp_path)
    file = tmp_path / "text_encoder.json"
    for text, message in (
        ('{"dim": 12', "is damaged or no JSON file"),
        ('{"dims": 12}', "does not describe a text encoder: .*'dims'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"{file} {message}"):
            EmbeddedTextEncoder.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"{tmp_path} holds no text encoder"):
        EmbeddedTextEncoder.load(tmp_path)


def test_cleaning_is_wans() -> None:
    assert clean(" a &amp;lt;b&amp;gt; \n\t“c” ") == 'a <b> "c"'
    assert clean("âœ” done") == "✔ done"
    assert clean("<i> &amp;amp; x") == "<i> & x"  # ftfy leaves escapes alone in a text with tags


def test_prompt_forms() -> None:
    assert join_prompt(PromptForm.joined, "G.", ["A.", "B."]) == ("G. A. B.", [0, 3, 6])
    assert join_prompt(PromptForm.joined, "", ["A."]) == ("A.", [0, 0])
    prompt, starts = join_prompt(PromptForm.holocine, "G.", ["A.", "B."])
    assert prompt == "[global caption] G. This scene contains 2 shots. [per shot caption] A. [shot cut] B."
    assert join_prompt(PromptForm.holocine, "G.", ["A."]) == ("G. A.", [0, 3])  # a prompt of one shot has no tags
    assert [prompt[start:].split("]")[0] for start in starts] == ["[global caption", "[per shot caption", "[shot cut"]


def test_one_prompt_is_cut_by_span(t5_folder: Path) -> None:
    joined = T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder), PromptForm.joined))
    features = joined.encode("the dog", ["a red fox", "", "Mira walks"])
    assert [len(rows) for rows in features] == [2, 3, 0, 3]  # the last caption has the row of the text's end too
    whole = joined.model(torch.tensor([joined.tokenizer("the dog a red fox Mira walks").input_ids])).last_hidden_state[
        0
    ]
    assert torch.equal(torch.cat(features), whole)
    assert features[0].dtype == torch.bfloat16
    assert [len(rows) for rows in joined.encode("", ["the dog"])] == [0, 3]


def test_a_piece_that_begins_with_the_space_before_its_word_is_of_its_words_caption(t5_folder: Path) -> None:
    encoder = T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder), PromptForm.joined))
    story = ("the dog", ["a red fox", "Mira walks"])
    expected, features_of = encoder.encode(*story), encoder._features

    def from_the_space(prompt: str) -> tuple[torch.Tensor, list[int]]:
        features, starts = features_of(prompt)
        return features, [max(0, start - 1) for start in starts]

    encoder._features = from_the_space
    assert all(torch.equal(a, b) for a, b in zip(encoder.encode(*story), expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("form", [PromptForm.joined, PromptForm.holocine])
def test_features_are_those_of_diffusers_pipeline(t5_folder: Path, form: PromptForm) -> None:
    """A negative prompt is one without shot captions: every shot sees it, with its end, as the base model does."""
    encoder = T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder), form))
    randomized(encoder.model.float())  # half precision would round padded rows otherwise
    components = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer, "transformer": None, "vae": None}
    pipeline = diffusers.WanPipeline(**components, scheduler=diffusers.UniPCMultistepScheduler())
    stories = {
        "the  dog &amp;amp;\n fox ": ["", ""],
        "": ["", ""],
        "a fox": ["a red dog"],
        "the dog.": ["Mira", "a fox"],
    }
    for caption, shots in stories.items():
        prompt = join_prompt(form, caption, shots)[0]
        expected = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0][0]
        features = encoder.encode(caption, shots)
        rows = torch.cat(features)
        torch.testing.assert_close(rows, expected[: len(rows)], rtol=1e-5, atol=1e-5)
        assert not expected[len(rows) :].any()
        if not any(shots):
            assert prompt == clean(caption)
            assert len(features[0]) == len(rows)


def test_separate_captions_do_not_see_each_other(t5_folder: Path) -> None:
    encoder = build_text_encoder(TextConfig(TextKind.t5, str(t5_folder)))
    one, two = encoder.encode("the dog", ["a fox"]), encoder.encode("the dog", ["Mira walks"])
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])
    assert len(encoder.encode("", ["a"])[0]) == 1


def test_a_window_is_the_global_caption_and_one_shots(t5_folder: Path) -> None:
    """An encoder of joined captions gives windows where they are asked for, and takes a story of any length so."""
    joined, windowed, holocine = (
        T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder), form, max_tokens=12))
        for form in (PromptForm.joined, PromptForm.windowed, PromptForm.holocine)
    )
    story = ("the dog", ["a red fox", "", "Mira walks"] * 30)
    features = joined.encode_windows(*story)
    assert [len(rows) for rows in features[:4]] == [0, 6, 3, 5]  # each caption has the row of its text's end too
    for rows, own in zip(features[1:], story[1], strict=True):
        assert torch.equal(rows, torch.cat(joined.encode("the dog", [own])))
    for encode in (windowed.encode, windowed.encode_windows):
        assert all(torch.equal(a, b) for a, b in zip(encode(*story), features, strict=True))
    for encode in (joined.encode, holocine.encode_windows):
        with pytest.raises(UserError, match=r"over the text encoder's 12.*moc\.text_anchor=global_and_own"):
            encode(*story)


@pytest.mark.parametrize("form", PromptForm)
def test_a_caption_without_shots_stands_alone_in_every_form(t5_folder: Path, form: PromptForm) -> None:
    encoder = T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder), form))
    expected = T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder))).encode("the dog", [])
    for found in (
        encoder.encode("the dog", []),
        encoder.encode_windows("the dog", []),
        encoder.encode_each(["the dog"]),
    ):
        assert len(found) == len(expected) == 1
        assert torch.equal(found[0], expected[0])


def test_a_caption_that_is_cut_is_told(caplog) -> None:
    encoder = EmbeddedTextEncoder(["cat"], TextConfig(max_tokens=4))
    assert len(encoder.encode_caption("cat cat cat")) == 4
    assert not caplog.messages
    assert len(encoder.encode_caption("cat cat cat cat")) == 4
    assert caplog.messages == [
        "a caption of 4 tokens is cut after 3, which are all that the model sees of it ('cat cat cat cat'...)"
    ]


def test_the_fingerprint_tells_whatever_changes_features(t5_folder: Path, tmp_path: Path) -> None:
    def print_of(folder: Path = t5_folder, **changes) -> str:
        return T5TextEncoder(TextConfig(TextKind.t5, str(folder), **changes)).fingerprint

    weights, words = (Path(shutil.copytree(t5_folder, tmp_path / name)) for name in ("weights", "words"))
    file = next(weights.glob("*.safetensors"))
    tensors = load_file(file)
    save_file(tensors | {"shared.weight": tensors["shared.weight"] + 1}, file, {"format": "pt"})
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(text.replace("▁fox", "▁cat"))
    same, *others = [print_of(), print_of(form="joined"), print_of(max_tokens=99), print_of(weights), print_of(words)]
    assert same == print_of(Path(shutil.copytree(t5_folder, tmp_path / "same")))
    assert len({same, *others}) == 5


def test_features_are_the_same_under_autocast(embedded: EmbeddedTextEncoder, t5_folder: Path) -> None:
    t5 = T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder)))
    for encoder, dtype in ((embedded, torch.bfloat16), (t5, torch.float16)):
        expected = encoder.encode("the dog", ["Mira walks"])
        with torch.autocast("cpu", dtype):
            found = encoder.encode("the dog", ["Mira walks"])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bad_text_settings_are_refused(t5_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text\.dim=3 must be finite and at least 4"):
        TextConfig(dim=3)
    assert EmbeddedTextEncoder(["fox"], TextConfig(dim=4)).encode_caption("a fox").isfinite().all()
    encoder = T5TextEncoder(TextConfig(TextKind.t5, str(t5_folder), max_tokens=8))
    assert len(encoder.encode("", ["the " * 7])[1]) == 8
    with pytest.raises(UserError, match="10 tokens is over the text encoder's 8"):
        encoder.encode("", ["the " * 9])
    with pytest.raises(UserError, match="is not a folder of a T5"):
        T5TextEncoder(TextConfig(TextKind.t5, str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="holds a 'gpt2' model"):
        T5TextEncoder(TextConfig(TextKind.t5, str(tmp_path)))
