"""Frozen weights of blocks wait in the host's memory and come to the device while the block before them computes.

Forward takes the blocks in order and backward in the reverse, where activation checkpointing computes each of them once
more before its gradients. Whenever a block begins, the next one of that direction starts on its way, on a stream of its
own; two slots of device memory hold the two. Weights that are trained stay on the device.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moc.errors import UserError
from moc.host_memory import Offsets, host_memory


class Swap:
    """A swap moves a model to a device, but for the frozen weights of `count` of its `blocks`, spread evenly over them.

    Raises UserError where it has fewer blocks, or nothing in them is frozen.
    """

    def __init__(self, model: Any, count: int, device: torch.device) -> None:
        blocks = model.blocks
        if count > len(blocks):
            raise UserError(f"swap_blocks={count} is more than the model's {len(blocks)} blocks")
        chosen = [block for i, block in enumerate(blocks) if (i + 1) * count // len(blocks) > i * count // len(blocks)]
        on_gpu = device.type == "cuda"
        self._waiting = [_Waiting(block, on_gpu) for block in chosen]
        size = max(len(waiting.host) for waiting in self._waiting)
        if not size:
            raise UserError(
                "parallel.swap_blocks is for weights that are not trained, and the blocks have none: set "
                "model.lora_rank, or freeze some with optim.rates"
            )
        model.to(device)
        for waiting in self._waiting:
            waiting.lie_in(waiting.host)
        self._slots = [_Slot(size, device) for _ in range(min(2, count))]
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._last = 0
        for index, block in enumerate(chosen):
            block.register_forward_pre_hook(partial(self._begin, index))

    def _begin(self, index: int, *_: object) -> None:
        """Waits for a swapped block, which is about to compute, and sends for the next one.

        What computes with the weights in the other slot has been launched before, backward included: autograd takes
        the nodes of a later block first."""
        self._bring(index, keep=self._last)
        slot = next(slot for slot in self._slots if slot.holds == index)
        if slot.arrived:
            slot.arrived.wait()
        forward, self._last = index == 0 or index > self._last, index
        ahead = index + 1 if forward else index - 1
        if 0 <= ahead < len(self._waiting):
            self._bring(ahead, keep=index)

    def _bring(self, index: int, keep: int) -> None:
        """Sends a block to the slot that does not hold block `keep`, unless it is in one or on its way."""
        if any(slot.holds == index for slot in self._slots):
            return
        slot = next((slot for slot in self._slots if slot.holds != keep), self._slots[0])
        if slot.holds is not None:
            held = self._waiting[slot.holds]
            held.lie_in(held.host)
        waiting, slot.holds = self._waiting[index], index
        if self._stream is None:
            slot.memory[: len(waiting.host)].copy_(waiting.host)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(slot.memory.device))
            with torch.cuda.stream(self._stream):
                slot.memory[: len(waiting.host)].copy_(waiting.host, non_blocking=True)
                slot.arrived = self._stream.record_event()
        waiting.lie_in(slot.memory)


class _Slot:
    """A slot is memory of the device for one block, the number of that block, and the event of its arrival on a GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.arrived: torch.cuda.Event | None = None


class _Waiting:
    """These are the frozen weights of a block, one after another in `host`, uint8 [bytes]. They have no memory of their
    own until `lie_in` gives them one."""

    def __init__(self, block: nn.Module, pinned: bool) -> None:
        self.weights = [weight for weight in block.parameters() if not weight.requires_grad]
        self._offsets = Offsets(self.weights)
        self.host = host_memory(self._offsets.size, pinned)
        for weight, here in zip(self.weights, self._offsets.views(self.host), strict=True):
            here.copy_(weight.detach())
            weight.data = weight.new_empty(0)

    def lie_in(self, memory: Tensor) -> None:
        """Makes the weights views of `memory`, which holds what `host` does."""
        for weight, here in zip(self.weights, self._offsets.views(memory), strict=True):
            weight.data = here
