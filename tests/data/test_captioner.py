"""These tests are about captions by a model: what it is shown, what is kept of its answers, and that it is asked
once."""

import shutil

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.manifest import SceneRecord, ShotRecord, load_manifest, write_manifest
from data.prepare.captioner import TransformersCaptioner, has_tags, lengths
from data.prepare.pipeline import prepare
from data.prepare.settings import PrepareConfig
from moc.errors import UserError
from tests.caches import RECORD_FAULTS
from tests.encoders import PoolCodec, WordText
from tests.films import read_numbers, write_numbered

WHOLE = "[character] character1 is a dog. [environment] A beach. [story] character1 runs."


class Scripted:
    """This captioner answers as told, and remembers the questions and the numbers in the pictures."""

    name = "scripted"

    def __init__(self, whole: str = WHOLE) -> None:
        self.whole, self.asked = whole, []

    def answer(self, pictures, question):
        numbers = read_numbers(torch.from_numpy(np.stack(pictures)))
        self.asked.append((numbers, question))
        return self.whole if "[environment]" in question and "[story] what" in question else "A dog runs. It is fast."


@pytest.fixture
def folder(tmp_path):
    write_numbered(tmp_path / "film.mkv", 60)
    shots = (ShotRecord(0, 17), ShotRecord(20, 29))
    captioned = SceneRecord(id="b", video="film.mkv", caption="by hand", shots=(ShotRecord(40, 49),))
    write_manifest(tmp_path / "manifest.jsonl", [SceneRecord(id="a", video="film.mkv", shots=shots), captioned])
    return tmp_path


def run(folder, scripted, **changes):
    settings = {"input": str(folder), "output": str(folder / "out"), "size": [64, 160], "detector": "adaptive"}
    return prepare(PrepareConfig(**settings | changes), PoolCodec(), WordText(), captioner=scripted)


def test_captions_are_made_where_there_are_none(folder):
    captioner = Scripted()
    made, by_hand = load_manifest(run(folder, captioner).manifest, root=folder)
    assert made.caption == WHOLE
    assert [shot.caption for shot in made.shots] == [("A dog runs.", "A dog runs. It is fast.")] * 2
    assert (by_hand.caption, by_hand.shots[0].caption) == ("by hand", "")
    shown = [numbers for numbers, _ in captioner.asked]
    assert shown == [[0, 11, 20, 25], [0, 5, 11, 16], [20, 23, 25, 28]]
    assert all(WHOLE in question for _, question in captioner.asked[1:])


def test_the_model_is_asked_once(folder):
    first = run(folder, Scripted())
    again = Scripted()
    second = run(folder, again)
    assert again.asked == []
    assert second.manifest.read_text() == first.manifest.read_text()
    shutil.rmtree(folder / "out" / "captions")
    run(folder, again)
    assert len(again.asked) == 3


@pytest.mark.parametrize("harm", RECORD_FAULTS)
def test_an_answer_that_is_not_as_written_is_asked_for_again(folder, harm):
    first = run(folder, Scripted())
    (record,) = (folder / "out/captions").glob("*.json")
    harm(record)
    again = Scripted()
    assert run(folder, again).manifest.read_text() == first.manifest.read_text()
    assert len(again.asked) == 3


def test_an_answer_out_of_form_is_a_record(folder):
    captioner = Scripted("a dog on a beach")
    prepared = run(folder, captioner)
    assert len(captioner.asked) == 2
    assert "Begin with [character]" in captioner.asked[1][1]
    problems = [(p["kind"], p["where"], p["action"]) for p in prepared.report.problems]
    assert ("bad-answer", "a", "warning") in problems  # the sample is taken without a caption
    assert "a" in {sample["id"] for sample in prepared.report.samples}
    with pytest.raises(DataError, match="did not answer in form"):
        run(folder, captioner, strict=True)


def test_form_and_lengths():
    assert has_tags(WHOLE)
    assert has_tags("Sure: " + WHOLE.replace(". [", ".\n["))
    assert not has_tags("[character] x [story] y [environment] z")
    assert not has_tags("[character] x [environment] [story] ")
    assert lengths("One. Two three.") == ("One.", "One. Two three.")
    assert lengths("Only one.") == "Only one."


def test_a_missing_model_is_said(folder):
    with pytest.raises(DataError, match="no such folder; give captioner=DIR"):
        run(folder, None, captioner=str(folder / "nowhere"))


def test_a_folder_that_is_no_model_is_said(folder):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="does not load as an image-text-to-text model") as caught:
        run(folder, None, captioner=str(folder / "model"))
    assert "\n" not in str(caught.value)
    (folder / "model/model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(UserError, match="is no index of its own shards"):
        run(folder, None, captioner=str(folder / "model"))


def save_tiny_model(folder):
    """Saves a LLaVA of random weights, as a local folder holds one."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *map(chr, range(33, 127))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=plain, additional_special_tokens=["<image>"], **special)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=hf.LlamaConfig(**sizes, vocab_size=len(words), num_key_value_heads=2),
        image_token_index=4,
    )
    hf.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.mark.slow
def test_a_model_from_a_folder_answers(tmp_path):
    torch.manual_seed(0)
    save_tiny_model(tmp_path)
    captioner = TransformersCaptioner(str(tmp_path), max_new_tokens=6)
    assert captioner.model.dtype == torch.bfloat16
    pictures = np.random.default_rng(0).integers(0, 255, (3, 64, 160, 3), np.uint8)
    answer = captioner.answer(list(pictures), "w h o ?")
    assert 0 < len(answer.split()) <= 6
    assert answer == captioner.answer(list(pictures), "w h o ?")
