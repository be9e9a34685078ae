"""These tests are about sampling: the clocks of the shots, the steps, what is in the stream when, and who may influence
whom."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moc import MoCConfig, StreamSpec
from moc.diffusion import Flow, SamplingConfig, Story, noise_key, sample_shots
from moc.diffusion.steps import plan_steps, sigma_table
from moc.errors import UserError
from moc.statistics import RoutingMap

SHAPE = (2, 1, 4, 4)
MOC, FLOW = MoCConfig(chunk_tokens=4, top_k=1), Flow(shift=2.0)


def story(num_shots: int, given=None) -> Story:
    """Texts tell the group by their value; the negative ones are negated."""
    text = [torch.full((1 + (group % 2), 3), 1.0 + group) for group in range(1 + num_shots)]
    return Story([SHAPE] * num_shots, text, [-x[:1] for x in text], given or {})


def film(model, config: SamplingConfig, what: Story, flow: Flow = FLOW, **others):
    return list(sample_shots(model, StreamSpec(), MOC, flow, what, config, **others))


class Recording:
    """This model wraps a velocity field (latents, sigma, text of each shot) and notes every call."""

    def __init__(self, field) -> None:
        self.field, self.calls, self.layouts = field, [], []

    def __call__(self, latents, sigma, text, layout, config, on_routes=None):
        shots = [int(abs(rows[0, 0])) - 2 for rows in text[1:]]
        self.calls.append((shots, sigma.clone(), [x.clone() for x in latents], bool(text[0][0, 0] > 0)))
        self.layouts.append(layout)
        if on_routes:
            routes = torch.full((1, layout.num_tokens, 1), -1, dtype=torch.int32)
            routes[:, -1] = next(i for i, chunk in enumerate(layout.chunks) if chunk.kind == "video")
            on_routes(0, routes)
        return self.field(latents, sigma, text[1:])


def towards_points(latents, sigma, texts):
    """Returns the velocity where all data of a shot is one point, the value of its text."""
    return [(x - rows[0, 0]) / s for x, s, rows in zip(latents, sigma, texts, strict=True)]


def entangled(latents, sigma, texts):
    """Every shot moves by what all shots of the stream are."""
    mean = torch.stack(latents).mean()
    return [x + mean + rows.sum() * s for x, s, rows in zip(latents, sigma, texts, strict=True)]


ONE_PASS = {"guidance_scale": 1.0, "history_sigma": 0.05}


@pytest.mark.parametrize("lag", [0.0, 0.27, 0.3, 0.5, 1.0])
def test_clocks_run_from_noise_to_clean_one_lag_apart(lag):
    config = SamplingConfig(steps=10, lag=lag)
    table = sigma_table(4, config, FLOW)
    delay = round(lag * 10)
    assert table.shape == (10 + 3 * delay + 1, 4)
    assert (table[0] == 1).all()
    assert (table[-1] == 0).all()
    assert (table.diff(dim=0) <= 0).all()
    own = FLOW.shifted(1 - torch.arange(11) / 10)
    for shot in range(4):
        torch.testing.assert_close(table[shot * delay : shot * delay + 11, shot], own)
        assert (table[: shot * delay, shot] == 1).all()
    if lag == 0:
        assert (table == table[:, :1]).all()
    if lag == 1:
        assert ((table > 0) & (table < 1)).sum(1).max() == 1


@pytest.mark.parametrize("shift", [0.29, 1.18, 1.58, 2.07, 2.64, 12.0])
def test_shots_begin_as_pure_noise_at_any_shift(shift):
    model = Recording(towards_points)
    made = film(model, SamplingConfig(steps=3, **ONE_PASS), story(2), Flow(shift=shift))
    assert [index for index, _ in made] == [0, 1]
    assert [float(sigma[-1]) for _, sigma, _, _ in model.calls][::3] == [1.0, 1.0]


@pytest.mark.parametrize("context", [None, 1])
def test_a_stream_knows_which_of_its_shots_a_cut_begins(context):
    model, cuts = Recording(towards_points), [True, False, True, False]
    film(model, SamplingConfig(1, context_shots=context, **ONE_PASS), replace(story(4), cuts=cuts))
    assert [len(shots) for shots, *_ in model.calls] == ([1, 2, 2, 2] if context else [1, 2, 3, 4])
    for (shots, *_), layout in zip(model.calls, model.layouts, strict=True):
        assert [shot.cut for shot in layout.samples[0][1]] == [cuts[index] for index in shots]


@pytest.mark.parametrize("lag", [0.0, 0.4, 1.0])
def test_euler_lands_on_a_point(lag):
    finished = film(Recording(towards_points), SamplingConfig(5, lag=lag, **ONE_PASS), story(3))
    assert [index for index, _ in finished] == [0, 1, 2]
    for index, latent in finished:
        assert latent.shape == SHAPE
        torch.testing.assert_close(latent, torch.full(SHAPE, 2.0 + index), atol=1e-5, rtol=0)


def test_euler_follows_the_flow_of_a_gaussian():
    """Data N(3, 0.5^2): the flow carries noise z to 3 + 0.5 z."""

    def gaussian(latents, sigma, _):
        gains = [(s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2) for s in sigma]
        return [g * (x - (1 - s) * 3) - 3 for g, x, s in zip(gains, latents, sigma, strict=True)]

    model = Recording(gaussian)
    ((_, latent),) = film(model, SamplingConfig(steps=200, **ONE_PASS), story(1))
    noise = model.calls[0][2][0]
    torch.testing.assert_close(latent, 3 + 0.5 * noise, atol=0.02, rtol=0)
    coarse = film(Recording(gaussian), SamplingConfig(steps=20, **ONE_PASS), story(1))[0][1]
    assert (coarse - latent).abs().max() > 1e-4  # the result depends on the number of steps


def test_a_step_is_dense_while_its_latest_shot_is_in_its_first_steps():
    steps = plan_steps(2, {}, SamplingConfig(steps=4, lag=0.5, dense_steps=1), FLOW)
    assert [step.is_dense for step in steps] == [True, False, True, False, False, False]


def test_shot_by_shot_sees_finished_shots_as_history():
    config = SamplingConfig(steps=3, lag=1.0, guidance_scale=1.0, history_sigma=0.1)
    model = Recording(towards_points)
    finished = dict(film(model, config, story(3)))
    assert [shots for shots, *_ in model.calls] == [[0]] * 3 + [[0, 1]] * 3 + [[0, 1, 2]] * 3
    first_noise = model.calls[0][2][0]
    for shots, sigma, latents, _ in model.calls[3:]:
        assert sigma[:-1].tolist() == pytest.approx([0.1] * (len(shots) - 1))
        assert sigma[-1] > 0.1
        torch.testing.assert_close(latents[0], 0.9 * finished[0] + 0.1 * first_noise)


def test_a_shot_is_in_the_stream_only_once_it_has_started():
    model = Recording(towards_points)
    film(model, SamplingConfig(steps=10, lag=0.3, **ONE_PASS), story(3))
    streams = [shots for shots, *_ in model.calls]
    assert streams == [[0]] * 3 + [[0, 1]] * 3 + [[0, 1, 2]] * 10
    starts = [next(sigma for shots, sigma, *_ in model.calls if shot in shots)[shot] for shot in range(3)]
    assert starts == [1, 1, 1]
    joint = Recording(towards_points)
    film(joint, SamplingConfig(steps=4, lag=0.0, **ONE_PASS), story(3))
    assert [shots for shots, *_ in joint.calls] == [[0, 1, 2]] * 4
    assert all((sigma == sigma[0]).all() for _, sigma, *_ in joint.calls)


@pytest.mark.parametrize("context", [1, 2])
def test_context_shots_limits_the_history(context):
    model = Recording(towards_points)
    film(model, SamplingConfig(steps=2, context_shots=context, **ONE_PASS), story(4))
    streams = [shots for shots, *_ in model.calls[::2]]
    assert streams == [list(range(max(0, shot - context), shot + 1)) for shot in range(4)]


@pytest.mark.parametrize("lag", [0.0, 0.5, 1.0])
def test_given_shots_are_history_from_the_start_and_stay_as_they_are(lag):
    given = {0: torch.full(SHAPE, 9.0), 2: torch.full(SHAPE, -9.0)}
    model = Recording(towards_points)
    finished = film(model, SamplingConfig(steps=4, lag=lag, **ONE_PASS), story(4, given))
    assert [index for index, _ in finished] == [1, 3]
    assert torch.equal(given[0], torch.full(SHAPE, 9.0))
    for shots, sigma, latents, _ in model.calls:
        assert 0 in shots
        assert sigma[shots.index(0)] == pytest.approx(0.05)
        assert latents[shots.index(0)].mean() > 8
        assert (2 in shots) == (3 in shots)  # a given shot is no history of the shots before it


@pytest.mark.parametrize("lag", [0.0, 0.5, 1.0])
def test_shots_come_as_soon_as_they_are_finished(lag):
    """A consumer that stops after the first shot has not paid for the last."""
    model = Recording(towards_points)
    shots = sample_shots(model, StreamSpec(), MOC, FLOW, story(3), SamplingConfig(4, lag=lag, **ONE_PASS))
    assert next(shots)[0] == 0
    assert len(model.calls) == 4
    assert [index for index, _ in shots] == [1, 2]


def test_later_shots_never_influence_earlier_ones_shot_by_shot():
    config = SamplingConfig(steps=3, lag=1.0, guidance_scale=2.0)
    short, long = film(Recording(entangled), config, story(2)), film(Recording(entangled), config, story(4))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(short, long, strict=False))
    joint = replace(config, lag=0.0)
    short, long = film(Recording(entangled), joint, story(2)), film(Recording(entangled), joint, story(4))
    assert not torch.equal(short[0][1], long[0][1])


def test_guidance_leads_away_from_the_negative_prompt():
    def by_text(latents, sigma, texts):
        return [torch.full_like(x, float(rows[0, 0])) for x, rows in zip(latents, texts, strict=True)]

    def moved(scale):
        model = Recording(by_text)
        ((_, latent),) = film(model, SamplingConfig(steps=1, guidance_scale=scale), story(1))
        return model.calls, latent - model.calls[0][2][0]

    calls, change = moved(1.0)
    assert [positive for *_, positive in calls] == [True]
    torch.testing.assert_close(change, torch.full(SHAPE, -2.0))
    calls, change = moved(3.0)
    assert [positive for *_, positive in calls] == [True, False]
    torch.testing.assert_close(change, torch.full(SHAPE, -(-2.0 + 3.0 * 4.0)))


def test_guidance_is_by_shot_and_noise_level():
    """Staggered: a step's shots stand at different levels. The negative side is asked where one shot needs it."""

    def by_text(latents, sigma, texts):
        return [torch.full_like(x, float(rows[0, 0])) for x, rows in zip(latents, texts, strict=True)]

    def moved(what: Story, **settings) -> tuple[list[Tensor], int]:
        model = Recording(by_text)
        config = SamplingConfig(steps=4, lag=0.5, guidance_scale=3.0, **settings)
        latents = film(model, config, what, Flow(shift=1.0))
        noise = [next(x[0] for shots, _, x, _ in model.calls if shots[0] == 0)]
        noise.append(next(x[1] for shots, _, x, _ in model.calls if len(shots) > 1))
        return [a - b for (_, a), b in zip(latents, noise, strict=True)], sum(not call[3] for call in model.calls)

    for own, settings, shares, negatives in (
        ((), {}, (3.0, 3.0), 6),
        ((None, 1.0), {}, (3.0, 1.0), 4),
        ((2.0, None), {}, (2.0, 3.0), 6),
        ((), {"guidance_interval": [0.4, 0.8]}, (2.0, 2.0), 4),  # two steps of four, at 0.75 and 0.5
        ((), {"guidance_interval": [0.6, 1.0]}, (2.0, 2.0), 4),  # at 1 and 0.75
        ((1.0, None), {"guidance_interval": [0.4, 0.8]}, (1.0, 2.0), 2),
    ):
        changes, asked = moved(replace(story(2), guidance=own), **settings)
        assert asked == negatives
        for change, text, scale in zip(changes, (2.0, 3.0), shares, strict=True):  # the negative text is -text
            torch.testing.assert_close(change, torch.full(SHAPE, -(-text + scale * 2 * text)))


@pytest.mark.parametrize("lag", [0.0, 0.5, 1.0])
def test_a_shot_moves_towards_the_end_it_must_have(lag):
    """Its last frame is the end at the shot's noise level in every step, and the end itself at last."""
    shape, end = (2, 3, 4, 4), torch.full((2, 1, 4, 4), 7.0)
    what = replace(story(2), shapes=[shape] * 2, ends={1: end})
    model = Recording(towards_points)
    finished = dict(film(model, SamplingConfig(3, lag=lag, **ONE_PASS), what))
    torch.testing.assert_close(finished[1][:, -1:], end)
    torch.testing.assert_close(finished[1][:, :-1], torch.full((2, 2, 4, 4), 3.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(finished[0], torch.full(shape, 2.0), atol=1e-5, rtol=0)
    calls = [(latents[-1][:, -1:], sigma[-1]) for shots, sigma, latents, _ in model.calls if shots[-1] == 1]
    noise = calls[0][0]
    for seen, sigma in calls:
        torch.testing.assert_close(seen, (1 - sigma) * end + sigma * noise)


def test_a_seed_means_a_story():
    config = SamplingConfig(steps=2, seed=4)
    first, again = film(Recording(entangled), config, story(2)), film(Recording(entangled), config, story(2))
    other = film(Recording(entangled), replace(config, seed=5), story(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    model = Recording(entangled)
    film(model, SamplingConfig(steps=1, lag=0.0, seed=4), story(2))
    noises = model.calls[0][2]
    assert not torch.equal(noises[0], noises[1])


def test_the_routing_map_counts_the_prompts_pass_alone():
    """The recording model routes the last token, of the last shot, to the first video chunk, of the first shot."""
    counts = []
    for scale in (1.0, 4.0):
        routing = RoutingMap(3)
        film(Recording(entangled), SamplingConfig(steps=2, guidance_scale=scale), story(3), routing_map=routing)
        counts.append(routing.counts)
    assert torch.equal(counts[0], counts[1])
    assert counts[0].sum((0, 1))[:, 0].tolist() == [2, 2, 2]
    assert counts[0][..., 1:].sum() == 0


def test_progress_counts_to_the_end():
    seen = []
    film(
        Recording(entangled),
        SamplingConfig(4, lag=0.5),
        story(3),
        on_step=lambda progress: seen.append((progress.step, progress.num_steps)),
    )
    assert seen == [(step, 8) for step in range(1, 9)]


@pytest.mark.parametrize("lag", [0.0, 0.4, 1.0])
def test_a_latent_that_is_not_finite_ends_with_its_shot_and_step(lag):
    """The second shot to be made breaks in its third step; a given one stands before both in the stream."""

    class Breaking(Recording):
        steps = 0

        def __call__(self, latents, sigma, text, *others, **more):
            velocity = super().__call__(latents, sigma, text, *others, **more)
            shots = self.calls[-1][0]
            if 2 in shots and 0 < sigma[shots.index(2)] < 1:
                self.steps += 1
            if self.steps == 2:
                velocity[shots.index(2)] = velocity[shots.index(2)] * torch.nan
            return velocity

    config = SamplingConfig(5, lag=lag, **ONE_PASS)
    with pytest.raises(FloatingPointError, match=r"shot 2, step 3 of 5: the latent is not finite"):
        film(Breaking(entangled), config, story(3, given={0: torch.zeros(SHAPE)}))


@pytest.mark.parametrize("lag", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("given", [{}, {1: torch.full(SHAPE, 9.0)}])
def test_a_story_goes_on_from_any_step_as_if_it_had_never_stopped(lag, given):
    config, stops = SamplingConfig(3, lag=lag, guidance_scale=2.0), []
    whole = film(Recording(entangled), config, story(4, given), on_step=stops.append)
    for stop in stops[:-1]:
        model = Recording(entangled)
        rest = film(model, config, story(4, given), start=stop)
        assert len(model.calls) == 2 * (stop.num_steps - stop.step)
        assert [index for index, _ in rest] == [index for index, _ in whole[-len(rest) :]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, whole[-len(rest) :], strict=True))
    assert film(Recording(entangled), config, story(4, given), start=stops[-1]) == []


def test_progress_is_told_once_the_finished_shots_are_taken():
    events = []
    config = SamplingConfig(2, guidance_scale=1.0)
    shots = sample_shots(
        *(Recording(entangled), StreamSpec(), MOC, FLOW, story(2), config),
        on_step=lambda progress: events.append((progress.step, sorted(progress.latents))),
    )
    for index, _ in shots:
        events.append(index)
    assert events == [(1, [0]), 0, (2, [0]), (3, [0, 1]), 1, (4, [0, 1])]


def test_every_shot_sees_the_references_whatever_the_context():
    model, given = Recording(towards_points), {0: torch.full(SHAPE, 9.0), 1: torch.full(SHAPE, -9.0)}
    config = SamplingConfig(1, context_shots=1, **ONE_PASS)
    finished = film(model, config, replace(story(5, given), num_references=2))
    assert [index for index, _ in finished] == [2, 3, 4]
    assert [shots for shots, *_ in model.calls] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]]
    with pytest.raises(ValueError, match="the first 3 shots are references"):
        replace(story(5, given), num_references=3)


def test_a_key_means_the_noise_of_a_shot_wherever_it_stands():
    keys = [noise_key(0, number) for number in (0, 7, 1)]
    model = Recording(entangled)
    film(model, SamplingConfig(1, lag=0.0, **ONE_PASS), replace(story(3), noise_keys=keys))
    plain = Recording(entangled)
    film(plain, SamplingConfig(1, lag=0.0, **ONE_PASS), story(3))
    (first, other, second), expected = model.calls[0][2], plain.calls[0][2]
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    assert not any(torch.equal(other, noise) for noise in expected)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": 0}, {"dense_steps": 51}, {"lag": 1.5}, {"history_sigma": 1.0}, {"context_shots": -1}),
        *({"guidance_scale": NAN}, {"guidance_scale": INF}, {"guidance_scale": -0.5}, {"lag": NAN}),
        *({"guidance_interval": [0.5]}, {"guidance_interval": [0.5, 0.5]}, {"guidance_interval": [0.0, 1.5]}),
        *({"high_noise_guidance_scale": -1.0}, {"high_noise_guidance_scale": NAN}, {"history_sigma": NAN}),
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"sampler\.{name}"):
        SamplingConfig(**wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": 1}, "1 texts and 3 negative ones"),
        ({"negative": 4}, "3 texts and 4 negative ones"),
        ({"cuts": (True,)}, "has 1 cuts"),
        ({"noise_keys": (1, 2, 3)}, "has 3 noise keys"),
        ({"given": {2: SHAPE}}, "at least one must be left"),
        ({"given": {0: SHAPE, 1: SHAPE}}, "at least one must be left"),
        ({"given": {0: (1, 1, 2, 2)}}, "shot 0 is given as"),
        ({"guidance": (1.0,)}, "has 1 guidance scales"),
        ({"ends": {1: (2, 2, 4, 4)}}, "shot 1 of .* cannot end in"),
        ({"ends": {2: SHAPE}}, r"ends are given for shots \[2\] of 2"),
    ],
)
def test_a_story_describes_one_set_of_shots(changes, message):
    text = [torch.zeros(1, 2)] * 4
    fields = {"text": 3, "negative": 3} | changes
    fields |= {name: text[: fields[name]] for name in ("text", "negative")}
    latents = fields.keys() & {"given", "ends"}
    fields |= {name: {i: torch.zeros(shape) for i, shape in fields[name].items()} for name in latents}
    with pytest.raises(ValueError, match=message):
        Story([SHAPE] * 2, **fields)
