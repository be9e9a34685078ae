"""These tests are about what a film keeps of its finished shots: counted before it is made, and moved to the host
without another film."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from data.errors import DataError
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.folder import METADATA, FilmFolder
from moc.diffusion import SamplingConfig
from moc.errors import UserError
from models.frozen import Base, FrozenLinear, has_fp8_matmuls
from tests.film.filming import contents


def write(folder: Path, shots: int) -> Path:
    """Returns a script of so many short shots."""
    story = {"size": [32, 48], "fps": 12, "global": "A journey.", "shots": [{"prompt": "Mia.", "seconds": 0.3}] * shots}
    path = folder / f"{shots}.yaml"
    path.write_text(yaml.safe_dump(story))
    return path


def open_filmmaker(trained: Path, **sampler) -> Filmmaker:
    config = SamplingConfig(steps=2, guidance_scale=2.0, **sampler)
    return Filmmaker(FilmmakerConfig(str(trained), device="cpu", sampler=config, keep_every=1))


def test_what_is_kept_is_counted_where_it_lies(trained, tmp_path):
    """A story of any length counts no more than the shots that the last one sees."""
    filmmaker = open_filmmaker(trained)

    def count(shots: int, **sampler):
        plan = filmmaker.plan(filmmaker.read(write(tmp_path, shots)))
        found = filmmaker.with_sampler(**sampler).estimate(plan)
        return found, "\n".join(found.lines(plan, 1e15))

    (few, _), (many, lines) = count(3), count(9)
    assert many.memory > few.memory
    assert many.host_memory == 0
    assert "host" not in lines
    bounded = [count(shots, context_shots=2)[0] for shots in (3, 9)]
    assert bounded[0].memory == bounded[1].memory == few.memory
    offloaded, lines = count(9, offload_cache=True)
    nothing = count(9, cache=False)[0]
    assert offloaded.memory < many.memory
    assert offloaded.host_memory > 0
    assert " MiB of the host's" in lines
    assert nothing.host_memory == count(9, cache=False, offload_cache=True)[0].host_memory == 0


def test_keys_and_values_lie_in_the_host_where_the_device_is_short(trained, tmp_path, monkeypatch):
    """They go there by the count of a film, if there is room and it is not said where they lie. The CPU is the
    host."""
    filmmaker = open_filmmaker(trained)
    plan = filmmaker.plan(filmmaker.read(write(tmp_path, 9)))
    here = filmmaker.estimate(plan)
    there = filmmaker.with_sampler(offload_cache=True).estimate(plan)
    for device, usable, host, moves in (
        ("cuda", there.memory, there.host_memory, True),
        ("cuda", here.memory, there.host_memory, False),
        ("cuda", there.memory - 1, there.host_memory, False),
        ("cuda", there.memory, there.host_memory - 1, False),
        ("cpu", there.memory, there.host_memory, False),
    ):
        plan.device = device
        monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _, usable=usable: usable)
        monkeypatch.setattr("film.fit.memory.host_free_bytes", lambda host=host: host)
        assert filmmaker.estimate(plan) == (there if moves else here)
        for said in (True, False):
            assert filmmaker.with_sampler(offload_cache=said).estimate(plan) == (there if said else here)


def test_a_film_goes_on_with_its_cache_in_the_host(trained, tmp_path):
    """Where memory did not suffice, nothing of what was made is lost."""
    script, films = write(tmp_path, 3), []
    for name, settings in (("whole", ({},)), ("moved", ({}, {"offload_cache": True}))):
        folder = FilmFolder(tmp_path / name)
        for number, sampler in enumerate(settings, start=1):
            filmmaker = open_filmmaker(trained, **sampler)
            plan = filmmaker.plan(filmmaker.read(script))
            try:
                filmmaker.film(plan, folder, watch=partial(_stop_at, 3 if number < len(settings) else None))
            except InterruptedError:
                assert not folder.is_finished
        films.append([path.read_bytes() for path in sorted((folder.path / "latents").iterdir())])
    assert films[0] == films[1]


def test_a_film_that_reuses_steps_says_how_many_and_goes_on_with_the_same_bytes(trained, tmp_path):
    filmmaker = open_filmmaker(trained, lag=0.0, step_cache=1000.0).with_sampler(steps=5)
    plan, films = filmmaker.plan(filmmaker.read(write(tmp_path, 2))), []
    for name, stops in (("whole", [None]), ("stopped", [4, None])):
        for stop in stops:
            with suppress(InterruptedError):
                filmmaker.film(plan, FilmFolder(tmp_path / name), watch=partial(_stop_at, stop))
        films.append(contents(tmp_path / name))
    assert films[0] == films[1]
    assert json.loads(films[0][METADATA])["reused_steps"] == 3


def test_films_of_weights_in_few_bytes_are_films_of_their_own(trained, tmp_path):
    """The films are close to that of the weights as they are, and known by what they are made with."""
    script, latents, requests = write(tmp_path, 1), {}, []
    kinds: list[dict] = [{}, {"weights": Base.int8}, {"weights": Base.fp8}]
    if has_fp8_matmuls(torch.device("cpu")):
        kinds.append({"weights": Base.fp8, "fp8_matmuls": True})
    for settings in kinds:
        sampler = SamplingConfig(steps=2, guidance_scale=1.0)
        filmmaker = Filmmaker(FilmmakerConfig(str(trained), device="cpu", sampler=sampler, **settings))
        plan = filmmaker.plan(filmmaker.read(script))
        folder = FilmFolder(tmp_path / str(len(requests)))
        filmmaker.film(plan, folder)
        latents[len(requests)] = folder.read_latent(1)
        requests.append(json.dumps(filmmaker.request(plan)))
    assert len(set(requests)) == len(requests)
    assert all((latents[n] - latents[0]).norm() < 0.1 * latents[0].norm() for n in range(1, len(requests)))
    frozen = [layer for layer in filmmaker.model.modules() if isinstance(layer, FrozenLinear)]
    assert frozen
    assert all(layer.fp8_matmul == ("fp8_matmuls" in kinds[-1]) for layer in frozen)
    with pytest.raises(DataError, match="holds another film"):
        filmmaker.film(plan, FilmFolder(tmp_path / "0"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": Base.fp32}, "say that, or weights=bf16"),
        ({"fp8_matmuls": True}, "set weights=fp8"),
        ({"weights": Base.int8, "fp8_matmuls": True}, "set weights=fp8"),
    ],
)
def test_weights_that_are_none_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FilmmakerConfig("checkpoint", **settings)


def _stop_at(step, progress) -> None:
    if progress.step == step:
        raise InterruptedError
