"""A batch goes to a device by one copy of its latents and one of its texts, from the memory that they lie in."""

import pytest
import torch

from data.loading.parcel import unwrap, wrap
from moc import Sample, make_batch
from moc.batch import Alike, StreamSpec, _side_by_side, each_shape, laid_out

SHAPES = [(3, 1, 2, 2), (3, 2, 4, 2), (3, 1, 2, 6)]


def batch():
    text = [torch.randn(rows, 5).half() for rows in (0, 3, 1, 2)]
    return make_batch([Sample([torch.randn(shape).half() for shape in SHAPES], text)], StreamSpec(), 24)


def pieces(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    flat, offsets = _side_by_side(tensors)
    return [flat[offset : offset + x.numel()].view(x.shape) for x, offset in zip(tensors, offsets, strict=True)]


@pytest.mark.parametrize("name", ["latents", "text"])
def test_what_a_loader_sends_is_not_copied_before(name):
    sent, arrived = batch(), unwrap(wrap(batch()))
    memory = getattr(arrived, name)
    found = pieces(memory)
    assert all(torch.equal(x, y) for x, y in zip(found, memory, strict=True))
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(found, memory, strict=True) if x.numel())
    apart = getattr(sent, name)
    assert all(torch.equal(x, y) for x, y in zip(pieces(apart), apart, strict=True))


def test_little_of_a_large_memory_and_views_that_are_not_contiguous_are_copied():
    memory = torch.arange(100.0)
    for tensors in (
        [memory[:10], memory[60:]],
        [memory[:60].view(6, 10).T, memory[60:]],
        [memory[10:20], memory[40:45]],
    ):
        found = pieces(tensors)
        assert all(torch.equal(x, y) for x, y in zip(found, tensors, strict=True))
    flat, _ = _side_by_side([memory[10:20], memory[40:45]])
    assert flat.data_ptr() != memory[10:].data_ptr()
    assert len(_side_by_side([memory[10:20], memory[20:30]])[0]) == 20


def test_it_arrives_in_fp32_with_its_shapes():
    moved = unwrap(wrap(batch())).to("meta")
    assert [tuple(x.shape) for x in moved.latents] == SHAPES
    assert {x.dtype for x in (*moved.latents, *moved.text)} == {torch.float32}


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 2, 4, 3)])
def test_what_is_alike_is_computed_at_once_and_stacked_once(sizes):
    tensors, numbers = [torch.randn(size, 2) for size in sizes], torch.arange(len(sizes)).float()
    by_place, calls = Alike([(range(len(sizes)), numbers)]), []
    doubled = each_shape(lambda x, n: calls.append(x) or 2 * x + n.view(-1, 1, 1), tensors, by_place)
    assert len(calls) == len(set(sizes))
    for mine, x, number in zip(doubled, tensors, numbers, strict=True):
        assert torch.equal(mine, 2 * x + number)
    assert [x is y for (_, x), (_, y) in zip(Alike.of(doubled).stacks, doubled.stacks, strict=True)] == [True] * len(
        calls
    )
    assert torch.equal(doubled.joined(), torch.cat(list(doubled)))
    assert torch.equal(each_shape(lambda x: x.sum((1, 2)), doubled).stacked(), torch.stack([x.sum() for x in doubled]))
    flat = torch.cat([x.flatten() for x in tensors])
    assert all(torch.equal(a, b) for a, b in zip(laid_out(flat, [x.shape for x in tensors]), tensors, strict=True))
