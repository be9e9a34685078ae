"""These tests are about the gradients of the multi-shot transformer, and what its layers keep for them."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moc import DropKey, MoCConfig, make_batch
from models.layers import _Join, _Split, join, spread
from models.linear import _Linear
from models.members import Members
from models.part import Part
from tests.small_mmdit import DENSE, MOC, pack, run, sample, small_model


@pytest.mark.parametrize("descriptor", ["post_rope", "pre_rope"])
def test_recomputation_gives_the_same_gradients_under_drops(descriptor: str) -> None:
    model = small_model()
    batch = pack(model, sample(num_shots=4))
    config = MoCConfig(chunk_tokens=6, top_k=3, descriptor=descriptor)

    def gradients(step: int) -> list[Tensor]:
        model.zero_grad()
        sum(v.square().sum() for v in run(model, batch, config, drops=DropKey(0, step))).backward()
        return [weight.grad.clone() for weight in model.parameters()]

    plain, other_step = gradients(step=1), gradients(step=2)
    model.enable_gradient_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    recomputed = gradients(step=1)
    assert len(calls) == 2
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(plain, other_step, strict=True))


def test_every_weight_learns() -> None:
    model = small_model(input_skip=True, frame_place=True)
    sum(v.square().sum() for v in run(model, pack(model, sample()), MOC)).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_spread_has_the_gradient_of_indexing() -> None:
    rows = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for lengths in ([2, 0, 3], [1, 70, 64]):  # the second lengths fill more than one tile
        group = torch.arange(3).repeat_interleave(torch.tensor(lengths))
        members = Members(group.int(), torch.tensor(lengths))
        assert torch.autograd.gradcheck(lambda r, members=members: spread(r, members), rows)
        assert torch.equal(spread(rows, members), rows[group])
        tiles, tile_group = members.tiles  # a GPU sums rows by these tiles
        assert tiles[tiles >= 0].tolist() == list(range(len(group)))
        assert all((group[tile[tile >= 0]] == own).all() for tile, own in zip(tiles, tile_group, strict=True))


def test_text_and_video_join_the_stream_and_leave_it_with_the_gradients_of_indexing() -> None:
    part = Part(make_batch([sample(2), sample(1)], small_model().stream, 12).layout)
    text, video = (torch.randn(len(index), 2, 3).double() for index in (part.text_index, part.video_index))
    leaves = [text.requires_grad_(), video.requires_grad_()]
    stream = _Join.apply(*leaves, part)
    assert torch.equal(stream[part.text_index], text)
    assert torch.equal(stream[part.video_index], video)
    assert all(torch.equal(x, y) for x, y in zip(_Split.apply(stream, part), leaves, strict=True))
    assert torch.autograd.gradcheck(lambda t, v: _Join.apply(t, v, part), leaves)
    assert torch.autograd.gradcheck(lambda x: _Split.apply(x, part), stream.detach().requires_grad_())
    mixed = _Join.apply(text.detach().float().requires_grad_(), video, part)
    assert mixed.dtype == video.dtype


class Operators(TorchDispatchMode):
    """This mode collects the names of torch's operators that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def test_backward_fills_and_adds_up_no_stream() -> None:
    """The gradient of indexing would fill and add up a whole stream, and on a GPU sort the indices, for each layer."""
    batch = make_batch([sample()], small_model().stream, 12)
    loss = sum(x.square().sum() for x in run(small_model(), batch, DENSE))
    with Operators() as seen:
        loss.backward()
    assert "index_copy_" in seen.names
    assert not seen.names & {"index_put", "index_put_", "_index_put_impl_", "index_fill", "index_fill_", "index_copy"}


def test_gradients_of_q_k_and_v_are_copied_once_to_lie_side_by_side() -> None:
    part, block = Part(make_batch([sample()], small_model().stream, 12).layout), small_model().blocks[0]
    text, video = (torch.randn(len(x), 3 * 48, requires_grad=True) for x in (part.text_index, part.video_index))
    loss = sum(y.square().sum() for y in join(text, video, (block.text.norms, block.video.norms), part))
    with Operators() as seen:
        loss.backward()
    assert "cat" in seen.names
    assert not seen.names & {"stack", "clone", "contiguous"}


def test_the_linears_of_a_block_have_the_gradients_of_plain_ones_under_autocast() -> None:
    """Those of weights are not rounded to half precision on a GPU (tests/models/test_models_gpu.py)."""
    plain, x = nn.Linear(24, 40), torch.randn(2, 9, 24, requires_grad=True)
    direction = torch.randn(2, 9, 40)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = (plain(x), _Linear.apply(x, plain.weight, plain.bias, torch.bfloat16))
    assert torch.equal(*outputs)
    leaves = (x, plain.weight, plain.bias)
    expected, found = (torch.autograd.grad(out, leaves, direction.bfloat16()) for out in outputs)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2**-7 * b.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_keeps_for_backward_what_a_plain_one_keeps(frozen: bool) -> None:
    """It keeps no input where the weight is frozen, and it keeps the weight transposed, by which `OffloadActivations`
    leaves it."""
    plain, x = nn.Linear(24, 40, bias=False).requires_grad_(not frozen), torch.randn(9, 24, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = _Linear.apply(x, plain.weight, None, torch.bfloat16)
        found = [(y.shape, y.stride(), y.dtype) for y in kept]
        kept.clear()
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain(x)
    assert torch.equal(out, expected)
    assert len(found) == 2 - frozen
    assert set(found) == {(y.shape, y.stride(), y.dtype) for y in kept}
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)))
