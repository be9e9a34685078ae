"""The attention alone needs torch and nothing of what training, sampling and preparing need."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]

ATTENTION = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import moc

layout = moc.ShotLayout.build([moc.Shot(5, (2, 4, 4)), moc.Shot(3, (2, 4, 4))], 7, 16)
q, k, v = torch.randn(3, layout.num_tokens, 2, 16).requires_grad_()
moc.moc_attention(q, k, v, layout, moc.MoCConfig(chunk_tokens=16, top_k=1)).sum().backward()
"""


def names(distributions: list[str]) -> set[str]:
    """Returns the packages that requirements bring to import."""
    wanted = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in distributions}
    found = packages_distributions().items()
    return {name for name, owners in found if wanted & {owner.lower().replace("_", "-") for owner in owners}}


def test_the_attention_alone_needs_torch_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.match(r"\w+", line)[0] for line in project["dependencies"]] == ["torch"]
    absent = names(project["optional-dependencies"]["video"])
    assert {"accelerate", "diffusers", "hydra", "numpy", "tqdm", "yaml"} <= absent
    torchs_own = {"fsspec", "filelock"}
    command = [sys.executable, "-c", ATTENTION, *sorted(absent - torchs_own)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
