"""Backend `torch`, masked and unmasked, equals the reference and repeats."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given

import moc
from moc.errors import UserError
from moc.kernels import masked, torch_backend
from tests.moc.against_reference import DROPS, assert_equal_to_reference
from tests.moc.test_reference import two_samples
from tests.strategies import attention_tensors, configs, seeds, streams

pytestmark = pytest.mark.usefixtures("listed")


@pytest.fixture(params=["masked", "unmasked"])
def way(request, monkeypatch):
    """Sets how the backend computes short samples, and how long ones."""
    if request.param == "unmasked":
        monkeypatch.setattr(masked, "MAX_TOKENS", 0)


@pytest.mark.parametrize("kernel", ["auto", "math"])
@given(streams(), configs(), seeds)
def test_torch_equals_the_reference(kernel, stream, config, seed):
    """Attention is masked, and unmasked."""
    layout, attend = stream.layout(), partial(torch_backend.attend, execution=moc.Execution(dense_kernel=kernel))
    q, k, _ = attention_tensors(layout, seed)
    assert_equal_to_reference(attend, layout, config, moc.route(q, k, layout, config))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", [{}, {"dense": True}, {"descriptor_subchunks": 3}])
def test_torch_with_drops_and_dense(settings):
    layout, config = two_samples(), moc.MoCConfig(causal=False, top_k=3, **settings)
    q, k, _ = attention_tensors(layout)
    assert_equal_to_reference(torch_backend.attend, layout, config, moc.route(q, k, layout, config, DROPS))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06), (torch.float16, 8e-3)])
def test_torch_in_lower_precision(dtype, tolerance):
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, _ = attention_tensors(layout)
    routes = moc.route(q, k, layout, config)
    assert_equal_to_reference(torch_backend.attend, layout, config, routes, dtype, tolerance, head_dim=32)


def test_more_chunks_than_one_call_takes_are_refused(monkeypatch):
    """Only kernels of GPUs take many lists in one call."""
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, _ = attention_tensors(layout)
    routes = moc.route(q, k, layout, config)
    for most, is_refused in ((layout.num_chunks, False), (layout.num_chunks - 1, True)):
        monkeypatch.setattr(torch_backend, "MAX_RUNS", most)
        (lists, *_) = torch_backend._lists(routes, layout.num_chunks, 4)
        with (
            pytest.raises(UserError, match=f"{layout.num_chunks} chunks.*chunk_tokens") if is_refused else nullcontext()
        ):
            torch_backend._VarLen._lengths(lists, layout)


def test_torch_a_few_heads_at_a_time_is_the_same(monkeypatch):
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    attend = partial(torch_backend.attend, execution=moc.Execution(dense_kernel="math"))
    q, k, _ = attention_tensors(layout, num_heads=5)
    monkeypatch.setattr(torch_backend, "MAX_ELEMENTS", 2 * layout.num_tokens * 2 * 4)
    routes = moc.route(q, k, layout, config)
    assert len(list(torch_backend._lists(routes, layout.num_chunks, 4))) == 3
    assert_equal_to_reference(attend, layout, config, routes, num_heads=5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("own", ["shot", "chunk", "none"])
def test_torch_gradcheck(own):
    layout = moc.ShotLayout.build([moc.Shot(1, (2, 2, 1)), moc.Shot(1, (2, 1, 2))], 1, chunk_tokens=2)
    config = moc.MoCConfig(top_k=1, own_anchor=own, causal=False)
    q, k, v = attention_tensors(layout, requires_grad=True, num_heads=1, head_dim=2)
    routes = moc.route(q, k, layout, config)
    assert torch.autograd.gradcheck(lambda *x: torch_backend.attend(*x, routes, layout, config), (q, k, v))


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_which_streams_are_masked(kernel):
    """Calls of short samples are masked, however many, unless another kernel is asked for."""
    layout = moc.ShotLayout.build([moc.Shot(0, (1, 16, 10))] * 4, chunk_tokens=256)
    q = torch.zeros(1, 2, 4)
    execution = moc.Execution(dense_kernel=kernel)
    assert masked.fits(q, moc.ShotLayout.pack([layout] * 3), execution) == (kernel == "auto")
    longer = moc.ShotLayout.build([moc.Shot(1, (1, 16, 10))] * 4, chunk_tokens=256)
    assert not masked.fits(q, moc.ShotLayout.pack([layout, longer]), execution)


@pytest.mark.parametrize(("text_anchor", "ends"), [("global_and_own", [5, 170, 330]), ("all", [175, 175, 330])])
def test_queries_have_no_keys_that_come_after_all_they_may_see(text_anchor, ends):
    """The global text and the first shot see of the second its caption at most."""
    layout = moc.ShotLayout.build([moc.Shot(5, (1, 16, 10)), moc.Shot(5, (1, 31, 5))], 5, chunk_tokens=256)
    config = moc.MoCConfig(chunk_tokens=256, text_anchor=text_anchor)
    runs = masked._runs(layout, config, layout.num_tokens)
    assert [run.queries.stop for run in runs] == [5, 170, 330]
    routes = moc.route(*attention_tensors(layout)[:2], layout, config)
    assert [run.mask(routes[:, run.queries], torch.float32).shape[-1] for run in runs] == ends


def test_what_a_mask_takes_from_the_stream_is_made_once_a_shot(monkeypatch):
    made, is_anchor = [], masked.is_anchor
    monkeypatch.setattr(masked, "is_anchor", lambda *args: made.append(args) or is_anchor(*args))
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout, requires_grad=True)
    for _ in range(3):
        moc.moc_attention(q, k, v, layout, config, backend="torch").sum().backward()
    assert len(made) == sum(group.end > group.start for group in layout.groups)


@pytest.mark.usefixtures("way")
def test_deterministic_gradients_repeat_bit_for_bit():
    layout, config, execution = two_samples(), moc.MoCConfig(top_k=2), moc.Execution("torch", deterministic=True)
    q, k, v = attention_tensors(layout, dtype=torch.float32, requires_grad=True)
    direction = torch.randn_like(q)

    def gradients():
        return torch.autograd.grad(moc.moc_attention(q, k, v, layout, config, backend=execution), (q, k, v), direction)

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


@pytest.mark.usefixtures("way")
def test_torch_refuses_a_second_derivative():
    """The plain kernel's backward could be differentiated, to wrong numbers."""
    layout, config = two_samples(), moc.MoCConfig(top_k=2)
    q, k, v = attention_tensors(layout, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        torch.autograd.grad(moc.moc_attention(q, k, v, layout, config).sum(), q, create_graph=True)


def test_autocast_leaves_the_plain_kernel_alone():
    layout, config, execution = two_samples(), moc.MoCConfig(top_k=2), moc.Execution("torch", "math")
    q, k, v = attention_tensors(layout, dtype=torch.float32, requires_grad=True)

    def both():
        out = moc.moc_attention(q, k, v, layout, config, backend=execution)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mine, other in zip(both(), expected, strict=True):
            assert torch.equal(mine, other)
