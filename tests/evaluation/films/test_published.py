"""These tests are about numbers that other tools write of films: VBench's, beside the paper's."""

import json
from pathlib import Path

import pytest

from evaluation.films.published import PAPER, SIX, beside_the_paper, read_vbench, vbench_command
from moc.errors import UserError


def test_vbench_is_read_and_never_made_up(tmp_path):
    names = list(SIX)
    (tmp_path / "a_eval_results.json").write_text(json.dumps({names[0]: [0.9, [{"video_results": 1}]]}))
    (tmp_path / "b_eval_results.json").write_text(json.dumps({names[3]: 0.5, "color": [0.1, []]}))
    found = read_vbench(tmp_path)
    assert found == {names[0]: 0.9, names[3]: 0.5}
    table = beside_the_paper({"mine": found})
    assert table[-1] == ["mine", "0.9000", "not measured", "not measured", "0.5000", "not measured", "not measured"]
    assert [row[0] for row in table[:-1]] == list(PAPER)
    assert "--mode=custom_input" in vbench_command([Path("film")])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a_eval_results.json").write_text(json.dumps({names[0]: [0.7, []]}))
    assert read_vbench(tmp_path)[names[0]] == pytest.approx(0.8)  # the mean of two films
    with pytest.raises(UserError, match="no result of VBench"):
        read_vbench(tmp_path / "none")
    (tmp_path / "b_eval_results.json").write_text("[1]")
    with pytest.raises(UserError, match="is not what VBench writes"):
        read_vbench(tmp_path / "b_eval_results.json")
