"""This module holds settings of every test: one thread, fixed seeds, hypothesis without deadlines or state between
runs. And one tiny world, prepared and trained on once, for all tests that need such things."""

import logging
import os
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from data.media.write import write_video
from tests import figures, pipeline, wan_files

torch.set_num_threads(1)

settings.register_profile("moc", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("moc")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _few_figures():
    with figures.left_out():
        yield


@pytest.fixture(scope="module")
def listed():
    """Short samples take the way of long ones: lists of gathered queries, which `triton_masked` spares them."""
    from moc.kernels import triton_masked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_masked, "MAX_TOKENS", 0)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Returns a folder of storyworld films."""
    return pipeline.make_world(tmp_path_factory.mktemp("tiny") / "world")


@pytest.fixture(scope="session")
def prepared(world):
    """Returns the prepared folder of the world."""
    return pipeline.prepare(world, world.parent / "prepared")


@pytest.fixture(scope="session")
def trained(prepared):
    """Returns a run of three steps on it."""
    return pipeline.train(prepared, prepared.parent / "run")


@pytest.fixture(scope="session")
def reduced():
    """Returns a reduced Wan transformer of diffusers' own."""
    return wan_files.reduced_wan()


@pytest.fixture
def reduced_folder(reduced, tmp_path):
    """Returns it as diffusers writes it."""
    reduced.save_pretrained(tmp_path / "diffusers")
    return tmp_path / "diffusers"


@pytest.fixture
def reduced_file(reduced, tmp_path):
    """Returns it under the release's names."""
    return wan_files.save_original(reduced, tmp_path / "wan.safetensors")


@pytest.fixture
def films(tmp_path):
    """Returns a folder with one short film."""
    pictures = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), np.uint8)
    write_video(tmp_path / "films/a.mp4", pictures, 12)
    return tmp_path / "films"


@pytest.fixture
def on_gpu(caplog):
    """Yields a context for one command: it must say that it takes the GPU, and at which precision, and use its
    memory."""

    @contextmanager
    def check(precision: str = "bf16"):
        caplog.clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with caplog.at_level(logging.INFO, "moc"):
            yield
        said = [message for message in caplog.messages if message.startswith("running on")]
        assert len(said) == 1
        assert re.fullmatch(rf"running on .+ \(cuda:0\), precision {precision}, 1 process", said[0])
        assert torch.cuda.max_memory_allocated() > before

    return check
