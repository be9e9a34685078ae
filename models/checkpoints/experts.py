"""Wan2.2-T2V-A14B and HoloCine are two transformers of one shape, one for high noise and one for low.

They are trained one at a time, each as a model of its own; sampling switches at the boundary, and can keep the expert
that is not in use in CPU memory.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import cpu_offload_with_hook
from torch import Tensor, nn

from moc import Execution
from moc.errors import UserError
from models.checkpoints.contents import EXPERT_FOLDERS
from models.kv_cache import KVCache
from models.stream import StreamModel

BOUNDARY = 0.875  # Wan2.2-A14B's own
NOISE = re.compile(r"(?<![a-z])(high|low)(?=noise|[^a-z]|$)")  # stands in a name, but not in "flow" or "lower"


class ExpertCaches(NamedTuple):
    """These are the caches of one story, one for each expert."""

    high: KVCache
    low: KVCache

    def keep_first(self, num_tokens: int) -> None:
        """Forgets all but the first `num_tokens` tokens."""
        for cache in self:
            cache.keep_first(num_tokens)


class Experts(nn.Module):
    """Two experts are one model to the sampler: `high` while the noisiest shot is at `boundary` or above, `low` below.

    boundary: in [0, 1]. The noisiest shot is the one being made: history is almost clean.
    """

    def __init__(self, high: StreamModel, low: StreamModel, boundary: float = BOUNDARY) -> None:
        super().__init__()
        if not 0 <= boundary <= 1:
            raise ValueError(f"boundary={boundary} must lie in [0, 1]")
        sizes = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (high, low)]
        if sizes[0] != sizes[1]:
            differ = sorted(k for k in sizes[0] if sizes[0][k] != sizes[1].get(k))
            raise UserError(f"the experts are not a pair: they differ in {differ}; name the two of one model")
        self.high, self.low, self.boundary = high, low, boundary
        self.stream = high.stream

    def forward(
        self,
        latents: list[Tensor],
        sigma: Tensor,
        *args: Any,
        cache: ExpertCaches | None = None,
        remember: bool = False,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Computes what `WanTransformer3DModel` does; reads the noise level, which waits for the device.

        Both experts remember, each in its own cache, whatever the noise level: a later shot will ask both.
        """
        high, low = (
            partial(model, latents, sigma, *args, cache=own, remember=remember, **kwargs)
            for model, own in zip((self.high, self.low), cache or (None, None), strict=True)
        )
        if remember:
            low()  # goes first: it finished the shot, and may still be on the device
            return high()
        return high() if float(sigma.max()) >= self.boundary else low()

    @property
    def execution(self) -> Execution:
        """Says how both compute their attention."""
        return self.high.execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        self.high.execution = self.low.execution = execution

    def new_cache(self, capacity: int, offload: bool = False) -> ExpertCaches:
        """Returns the empty caches of a story. capacity, offload: as in `KVCache`."""
        return ExpertCaches(self.high.new_cache(capacity, offload), self.low.new_cache(capacity, offload))

    def offload(self, device: torch.device) -> None:
        """Keeps both in CPU memory, and on `device` the one that was called last."""
        device = torch.empty(0, device=device).device  # gives the device an index, which the hooks compare
        _, of_high = cpu_offload_with_hook(self.high.to("cpu"), device)
        _, of_low = cpu_offload_with_hook(self.low.to("cpu"), device, of_high)
        of_high.hook.prev_module_hook = of_low


def check_order(high: Path, low: Path) -> None:
    """Raises UserError where two experts' names say that they are swapped. What their paths share says nothing."""
    said = [
        {
            word
            for name in set(own.absolute().parts) - set(other.absolute().parts)
            for word in NOISE.findall(name.lower())
        }
        for own, other in ((high, low), (low, high))
    ]
    if said == [{"low"}, {"high"}] or (low.name, high.name) in EXPERT_FOLDERS:
        raise UserError(
            f"{high} is named as the low-noise expert and {low} as the high-noise one: the high-noise expert is "
            "checkpoint, the other one low_noise_checkpoint; rename them if their names mislead"
        )
