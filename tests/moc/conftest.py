"""This is what tests of training share. torch is imported within, since pytest reads this before `tests.fixtures`."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

# The keys name the runs of two processes, and the values are their arguments.
TWO = {
    "plain": [],
    "poisoned": ["--poisoned", "scene0.75"],
    "told": ["--told", "1"],
    "full": ["--full", "2"],
    "shard": ["--axis", "shard", "--validation", "3"],
    "sequence": ["--axis", "sequence", "--validation", "3"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Makes a small cache to train the debug model on; returns its folder."""
    from tests.runs import make_cache

    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> Path:
    """Returns a folder of the runs of TWO, which the same two processes trained: most of their time they start. In
    said.txt is what both said on standard error."""
    from tests.runs import THEN, launch, make_cache

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared  # all pytest workers share this folder
    folder = shared / "two_processes"
    with FileLock(shared / "two_processes.lock"):
        if not (folder / "said.txt").exists():
            small = make_cache(folder / "cache")
            words = [word for name, asked in TWO.items() for word in (THEN, small, folder / name, *asked)]
            (folder / "said.txt").write_text(launch(2, *words[1:]))
    return folder
