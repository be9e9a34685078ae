"""A batch goes to a device by a copy for each shape of its latents and texts, and what is alike stays stacked."""

import pytest
import torch

from data.loading.parcel import unwrap, wrap
from moc import Sample, make_batch
from moc.batch import Alike, StreamSpec, each_shape, joined, laid_out

SHAPES = [(3, 1, 2, 2), (3, 2, 4, 2), (3, 1, 2, 6)]


def batch():
    text = [torch.randn(rows, 5).half() for rows in (0, 3, 1, 2)]
    return make_batch([Sample([torch.randn(shape).half() for shape in SHAPES], text)], StreamSpec(), 24)


def test_what_a_loader_sends_lies_in_one_memory_and_is_stacked():
    sent, arrived = batch(), unwrap(wrap(batch().in_stacks()))
    assert len({x.untyped_storage().data_ptr() for x in (*arrived.latents, *arrived.text)}) == 1
    for name in ("latents", "text"):
        mine, theirs = getattr(arrived, name), getattr(sent, name)
        assert Alike.of(mine) is mine
        assert [x.shape for x in mine] == [x.shape for x in theirs]
    stacked = sent.in_stacks()
    assert all(torch.equal(x, y) for x, y in zip(stacked.latents, sent.latents, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(stacked.to("cpu").text, sent.text, strict=True))


def test_it_arrives_in_fp32_with_its_shapes():
    moved = unwrap(wrap(batch().in_stacks())).to("meta")
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
    assert torch.equal(joined(doubled), torch.cat(list(doubled)))
    assert torch.equal(each_shape(lambda x: x.sum((1, 2)), doubled).stacked(), torch.stack([x.sum() for x in doubled]))
    flat = torch.cat([x.flatten() for x in tensors])
    assert all(torch.equal(a, b) for a, b in zip(laid_out(flat, [x.shape for x in tensors]), tensors, strict=True))
