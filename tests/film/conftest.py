"""This module has fixtures of the tests of films."""

import threading
from pathlib import Path

import pytest
import yaml

import film.studio as studio_module
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.studio import Studio
from moc.diffusion import SamplingConfig


@pytest.fixture
def write(tmp_path):
    def write(story: dict, name: str = "story.yaml") -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(story))
        return tmp_path / name

    return write


@pytest.fixture
def studio(trained, tmp_path):
    config = FilmmakerConfig(str(trained), device="cpu", sampler=SamplingConfig(steps=3, guidance_scale=2.0))
    return Studio(Filmmaker(config), tmp_path / "studio", preview_steps=1)


@pytest.fixture
def in_step(monkeypatch):
    """Films wait after each step until who listens asks for the next state; once nobody listens they make no step
    more."""
    in_a_thread = studio_module._in_a_thread

    def waiting(work):
        turns, is_over = threading.Semaphore(0), threading.Event()

        def run(watch):
            def on_step(progress):
                watch(progress)
                turns.acquire()
                while is_over.is_set():
                    watch(progress)  # this raises as soon as the film is told to stop

            work(on_step)

        making = in_a_thread(run)
        try:
            yield next(making)
            for done in making:
                yield done
                turns.release()
        finally:
            is_over.set()
            turns.release()
            making.close()

    monkeypatch.setattr(studio_module, "_in_a_thread", waiting)
