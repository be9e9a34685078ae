"""These tests are about what a film will cost, against what sampling asks of the model; films that do not fit into
memory are refused."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from film.estimate import Estimate, estimate
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.fit import check_fits
from film.folder import FilmFolder
from moc.diffusion import sample_shots
from moc.errors import UserError
from moc.training import MeshConfig
from models.checkpoints.experts import Experts
from models.encoders.lapped import LappedCodec
from models.frozen import Base
from tests.film.filming import SHOT, STORY, film_of, open_filmmaker
from tests.pipeline import command, refusal


@pytest.mark.parametrize(
    "settings",
    [{"lag": 0.0}, {}, {"context_shots": 1}, {"cache": False, "guidance_interval": [0.0, 0.9]}],
    ids=str,
)
def test_an_estimate_counts_what_the_model_is_asked(trained, write, settings, monkeypatch):
    """Its forwards are those that sampling has, and so are the tokens in their linear layers."""
    filmmaker = open_filmmaker(trained, **settings)
    story = STORY | {"shots": [SHOT, SHOT | {"cut": False, "guidance": 1}, SHOT]}
    plan = filmmaker.plan(filmmaker.read(write(story)))
    guess = filmmaker.estimate(plan)
    calls, forward = [], filmmaker.model.forward

    def counting(latents, *arguments, **others):
        calls.append(sum(x.shape[-3] * x.shape[-2] * x.shape[-1] // 4 for x in latents))
        return forward(latents, *arguments, **others)

    monkeypatch.setattr(filmmaker.model, "forward", counting)
    list(
        sample_shots(
            filmmaker.model, filmmaker.model.stream, filmmaker.moc, filmmaker.flow, plan.story(), filmmaker.sampler
        )
    )
    assert guess.forwards == len(calls)
    layers = list(filmmaker.model.blocks)
    linears = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
    assert 2 * linears * sum(calls) < guess.flops < guess.dense_flops
    assert 0 < guess.sparsity < 1
    text = "\n".join(guess.lines(plan, 1e15))
    for seconds, told in ((90, "about 90 s"), (300, "about 5 minutes"), (9000, "about 2.5 hours")):
        peak = 2 * guess.flops / seconds
        assert guess.lines(plan, peak)[-1].startswith(f"{told} at half of the GPU's peak")
    assert filmmaker.cost(plan)[-1].startswith("less than a second at half of an H100's peak")
    for flops, told in ((2.5e15, "2.5 PFLOP"), (9e14, "900 TFLOP"), (7e6, "0.007 GFLOP")):
        assert f" of {told} in all" in "\n".join(replace(guess, flops=flops).lines(plan, 1e15))
    assert "goes on" in text
    assert f"{sum(guess.shot_tokens)} tokens" in text


def test_decoding_counts_where_it_takes_more_than_a_forward(trained, write, monkeypatch):
    """What would surely not fit is told without it, since the count is rough."""
    filmmaker, found = open_filmmaker(trained), []
    plan = filmmaker.plan(filmmaker.read(write(STORY)))
    for decoding in (0, 1, 1e9, 3e9):
        monkeypatch.setattr(type(filmmaker.encoders.codec), "decoding_bytes", lambda *_, size=decoding: size)
        found.append(filmmaker.estimate(plan))
    assert found[0] == found[1]
    assert found[3].memory - found[2].memory == 2e9 > found[2].memory - found[1].memory > 0.9e9
    assert len({one.least for one in found}) == 1


@pytest.fixture
def no_decoding(monkeypatch):
    """Counts no decoding, beside which nothing else of a tiny film counts."""
    monkeypatch.setattr(LappedCodec, "decoding_bytes", lambda *_: 0)


@pytest.mark.usefixtures("no_decoding")
def test_two_experts_have_twice_the_weights_and_twice_the_memory(trained, write):
    """Where experts take turns only one is on the device, but what both remember is."""
    filmmaker = open_filmmaker(trained)
    plan = filmmaker.plan(filmmaker.read(write(STORY)))
    one, pair = filmmaker.model, Experts(filmmaker.model, deepcopy(filmmaker.model))
    settings = {"moc": filmmaker.moc, "flow": filmmaker.flow, "codec": filmmaker.encoders.codec}
    assert filmmaker.moc.flows_forward

    def memory(model, offload=False, mesh=None, swap_blocks=0, **sampler) -> float:
        where = {"mesh": mesh, "offload": offload, "swap_blocks": swap_blocks}
        return estimate(plan, replace(filmmaker.sampler, **sampler), model, **settings, **where).memory

    weights = sum(weight.nbytes for weight in one.parameters())
    assert memory(pair, cache=False) - memory(one, cache=False) == weights
    assert memory(pair, cache=False, offload=True) == memory(one, cache=False)
    assert memory(pair) - memory(one) > weights
    assert memory(one, guidance_scale=1.0) < memory(one)
    assert memory(pair, mesh=MeshConfig(sequence=2)) == memory(pair) / 2
    assert memory(pair) - memory(pair, mesh=MeshConfig(shard=2)) == weights
    block = sum(weight.nbytes for weight in one.blocks.parameters()) / len(one.blocks)
    assert memory(one, swap_blocks=2) == memory(one)  # two blocks are always on the device
    assert memory(pair) - memory(pair, swap_blocks=3) == 2 * block
    offloaded = estimate(plan, replace(filmmaker.sampler, offload_cache=True), pair, **settings)
    caches = 4 * len(one.blocks)  # layers of both experts on both sides of guidance, of which two are on the device
    assert memory(pair) - offloaded.memory == pytest.approx(offloaded.host_memory * (1 - 2 / caches))


@pytest.mark.usefixtures("no_decoding")
def test_a_film_longer_than_memory_allows_is_refused_with_what_fits(trained, write, tmp_path, monkeypatch, caplog):
    """It is told before the first film of a batch is begun; what is said to fit does, and a film that may fit is
    made."""
    filmmaker = open_filmmaker(trained, lag=0.0, steps=1)
    stories = [write(STORY | {"shots": [SHOT] * count}, f"{count}.yaml") for count in (1, 13)]
    films = [(filmmaker.read(story), FilmFolder(tmp_path / story.stem)) for story in stories]
    plan = filmmaker.plan(films[1][0])
    need = filmmaker.estimate(plan)
    usable = filmmaker.estimate(plan.first(3)).memory
    assert filmmaker.estimate(plan.first(4)).memory > usable
    assert usable < need.least < need.memory
    monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _: usable)
    with pytest.raises(UserError, match=r"13 shots, \d+ tokens, need .* of memory at least, and there are") as refused:
        filmmaker.make(films)
    assert "sampler=shot_by_shot" in str(refused.value)
    assert str(refused.value).endswith("or its first 3 shots")
    assert not (tmp_path / "1").exists()
    monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _: need.least)
    filmmaker.make(films)
    assert "13 shots" in caplog.text
    assert "may need about" in caplog.text
    monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _: 0)
    filmmaker.make(films)  # the films are whole, so no memory is needed


@pytest.mark.usefixtures("no_decoding")
def test_where_one_shot_is_too_long_it_is_told_how_long_shots_may_be(trained, write, monkeypatch):
    filmmaker = open_filmmaker(trained)

    def plan_of(seconds: float):
        return filmmaker.plan(filmmaker.read(write(STORY | {"shots": [SHOT | {"seconds": seconds}] * 2})))

    usable = filmmaker.estimate(plan_of(10)).memory
    monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _: usable)
    with pytest.raises(UserError, match=r"what fits is shots of at most [0-9.]+ s$") as refused:
        filmmaker.check_memory(plan_of(400))
    longest = float(str(refused.value).split()[-2])
    assert 9 < longest <= 10
    filmmaker.check_memory(plan_of(longest))


def test_what_would_fit_is_what_its_folder_and_the_processes_take(trained, write, tmp_path, monkeypatch):
    """A film that is there takes no settings that its frames would show, and experts on shards are not offloaded."""
    filmmaker = open_filmmaker(trained, lag=0.0, steps=1)
    story, folder = write(STORY), tmp_path / "film"
    film_of(filmmaker, story, folder)
    monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _: 1)
    anew = write(STORY | {"shots": [SHOT | {"seed": 5}, *STORY["shots"][1:]]})
    with pytest.raises(UserError, match="name another folder for out, and there take sampler=shot_by_shot"):
        film_of(filmmaker, anew, folder, redo=[1])

    def count(plan, sampler, offload=False) -> Estimate:
        return replace(filmmaker.estimate(plan), least=2, memory=0 if offload else 2)

    plan = filmmaker.plan(filmmaker.read(story))
    for is_sharded in (False, True):
        with pytest.raises(UserError) as refused:
            check_fits(plan, count, filmmaker.sampler, False, 1, is_sharded)
        assert ("offload=true" in str(refused.value).partition("what fits is")[2]) is not is_sharded


def test_the_least_memory_is_that_of_the_step_that_needs_most(trained, write, tmp_path, monkeypatch):
    """That is the first step where a long shot comes before short ones; a shot made anew needs its own step alone."""
    filmmaker = open_filmmaker(trained)
    long, even = (
        filmmaker.plan(filmmaker.read(write(STORY | {"shots": [SHOT | {"seconds": seconds}, SHOT, SHOT]})))
        for seconds in (4, SHOT["seconds"])
    )
    assert filmmaker.estimate(long).least == filmmaker.estimate(long.first(1)).least
    assert filmmaker.estimate(even).least > filmmaker.estimate(even.anew([1])).least
    assert filmmaker.estimate(even).least == filmmaker.estimate(even.anew([3])).least
    film_of(filmmaker, write(STORY), tmp_path / "film")
    least = filmmaker.estimate(even.anew([1])).least
    monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _: least)
    film_of(filmmaker, write(STORY | {"shots": [SHOT | {"seed": 5}, *STORY["shots"][1:]]}), tmp_path / "film", redo=[1])
    with pytest.raises(UserError, match="of memory at least"):
        film_of(filmmaker, write(STORY), tmp_path / "other")


def test_features_are_counted_in_the_precision_of_the_forward_and_weights_in_their_own(trained, write):
    """It is so whatever the precision of the first parameter is: Wan's modulation stays in fp32."""

    def count(**settings) -> tuple[float, float]:
        filmmaker = Filmmaker(FilmmakerConfig(str(trained), device="cpu", **settings))
        plan = filmmaker.plan(filmmaker.read(write(STORY)))
        weights = sum(weight.nbytes for weight in filmmaker.model.parameters())
        return weights, filmmaker.estimate(plan).least - weights

    weights, features = count()
    assert count(precision="bf16")[1] == features / 2
    kept, features_over_fp8 = count(weights=Base.fp8)
    assert kept < weights
    assert features_over_fp8 == features


def test_an_estimate_tells_where_rounding_each_shot_makes_another_length(trained, write):
    """Frames of one shot are not carried over to the next: one made anew in another length would change the others."""
    filmmaker = open_filmmaker(trained)
    for seconds, said in (
        (0.7, r"10 shots, 80 frames, 6\.67 s \(the script says 7\.00 s; each shot is rounded by itself\), \d+ tokens"),
        (8 / 12, r"10 shots, 80 frames, 6\.67 s, \d+ tokens"),
    ):
        plan = filmmaker.plan(filmmaker.read(write(STORY | {"shots": [SHOT | {"seconds": seconds}] * 10})))
        assert re.search(f"^{said}$", "\n".join(filmmaker.cost(plan)), re.MULTILINE)


def test_a_dry_run_makes_no_film(trained, write, tmp_path, capsys):
    arguments = (f"checkpoint={trained}", f"script={write(STORY)}", f"out={tmp_path / 'film'}", "device=cpu")
    command("sample.py", *arguments, "dry_run=true")
    assert "3 shots, 13 frames" in capsys.readouterr().out
    assert not (tmp_path / "film").exists()


def test_a_dry_run_of_a_shot_made_anew_tells_what_that_costs(trained, write, tmp_path, capsys):
    """The shots that stay are seen and not sampled; shots that the film lacks are refused as they would be."""
    filmmaker, folder = open_filmmaker(trained, steps=5), tmp_path / "film"
    paths = [f"checkpoint={trained}", f"script={write(STORY)}", f"out={folder}"]
    asked = [*paths, "device=cpu", "sampler.steps=5", "sampler.guidance_scale=2.0", "dry_run=true"]
    assert "holds no film to make shots [2] of anew" in refusal(capsys, "sample.py", *asked, "redo=[2]")
    film_of(filmmaker, write(STORY), folder)
    plan = filmmaker.plan(filmmaker.read(write(STORY)))
    whole, alone = filmmaker.cost(plan), filmmaker.cost(plan.anew([2]))
    told = []
    for redo in ([], ["redo=[2]"]):
        capsys.readouterr()
        command("sample.py", *asked, *redo)
        told.append(capsys.readouterr().out.splitlines()[1:])
    assert told == [whole, alone]
    assert whole[4].startswith("3 shots, 13 frames")
    assert alone[4].startswith("3 shots, of which 1 is made, 13 frames")
    forwards = [int(lines[5].split(" forwards")[0]) for lines in told]
    assert forwards[1] < forwards[0]
    assert "the film has shots 1 to 3, and no 4" in refusal(capsys, "sample.py", *asked, "redo=[4]")


@pytest.mark.usefixtures("no_decoding")
def test_a_dry_run_tells_what_would_fit(trained, write, monkeypatch):
    filmmaker = open_filmmaker(trained, lag=0.0, steps=1)
    plan = filmmaker.plan(filmmaker.read(write(STORY | {"shots": [SHOT] * 13})))
    fits = filmmaker.cost(plan)
    usable = filmmaker.estimate(plan.first(3)).memory
    monkeypatch.setattr("film.filmmaker.usable_bytes", lambda _: usable)
    *lines, last = filmmaker.cost(plan)
    assert lines == fits
    assert last.startswith("it does not fit into the memory of the CPU: ")
    assert last.endswith("or its first 3 shots")
