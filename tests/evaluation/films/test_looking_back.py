"""These tests are about the README's moving picture: which head it shows, and that the command draws it."""

import json

import pytest
import torch
from PIL import Image

from evaluation.films.looking_back import most_pointed
from tests.pipeline import ROOT, assert_one_message, command, refusal


def test_the_head_is_shown_that_looks_to_single_shots():
    even = torch.ones(4, 4).tril(-1)
    pointed = torch.tensor([[0, 0, 0, 0], [9, 0, 0, 0], [1, 8, 0, 0], [9, 0, 0, 0]]).float()
    layer, head, shares = most_pointed({0: torch.stack([even, even]), 2: torch.stack([even, pointed])})
    assert (layer, head) == (2, 1)
    assert shares[2].tolist() == pytest.approx([1 / 9, 8 / 9, 0, 0])


@pytest.mark.parametrize("count", [2, 3])
def test_references_are_not_counted_as_shots(count, tmp_path, capsys):
    """The shares are those of shots; where there are two there is nothing to choose."""
    Image.new("RGB", (96, 64)).save(tmp_path / "mia.png")
    shots = [{"prompt": f"Mia walks past {n} trees.", "seconds": 5 / 12} for n in range(count)]
    story = {"size": [64, 96], "fps": 12, "shots": shots, "references": [{"prompt": "Mia.", "image": "mia.png"}]}
    (tmp_path / "story.yaml").write_text(json.dumps(story))
    arguments = (
        "scripts/draw_memory.py", f"checkpoint={ROOT / 'docs/checkpoints/recall_moc'}",
        f"script={tmp_path / 'story.yaml'}", f"out={tmp_path / 'film'}", f"output={tmp_path / 'memory.webp'}",
        "device=cpu", "sampler.steps=1", "sampler.guidance_scale=1",
    )  # fmt: skip
    if count == 2:
        assert_one_message(refusal(capsys, *arguments), "has 2 shots", "give three")
        return
    command(*arguments)
    table = capsys.readouterr().out.partition("looks back to\n")[2].partition("]]")[0]
    shares = [[float(share) for share in row.strip(" [\n").split()] for row in table.split("]")]
    assert [len(row) for row in shares] == [3, 3, 3]
    assert shares[0] == [0, 0, 0]
    assert sum(shares[2]) > 0


@pytest.mark.parametrize("dense", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_film_is_drawn_with_where_it_looks_to(dense, tmp_path, capsys):
    picture = tmp_path / "memory.webp"
    arguments = (
        "scripts/draw_memory.py", f"checkpoint={ROOT / 'docs/checkpoints/recall_moc'}",
        f"script={ROOT / 'configs/scripts/recall.yaml'}", f"moc.dense={str(dense).lower()}",
        f"out={tmp_path / 'film'}", f"output={picture}", "device=cpu", "sampler.steps=1",
        "sampler.guidance_scale=1",
    )  # fmt: skip
    if dense:
        assert_one_message(refusal(capsys, *arguments), "recall_moc", "routes nowhere")
        return
    command(*arguments)
    with Image.open(picture) as image:
        assert image.n_frames > 8
    assert_one_message(refusal(capsys, *arguments), "exists", "another folder")
