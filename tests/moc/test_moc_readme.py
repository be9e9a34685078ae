"""These tests are about moc/README.md: its code runs as it stands, one block after another."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "moc/README.md"


def test_the_code_runs_and_is_short(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    lines = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    assert names["out"].shape == names["x"].shape
    assert names["out"].isfinite().all()
    assert isinstance(names["out"], torch.Tensor)
    said = capsys.readouterr().out
    assert "sparsity" in said
    assert "share_by_distance" in said
