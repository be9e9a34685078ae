"""Wan2.2-T2V-A14B and HoloCine: two transformers of one shape, one for high noise and one for low.

They are trained one at a time, each as a model of its own; sampling switches at the boundary.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from models.stream import KeyValueCache
from models.wan import WanTransformer3DModel

ExpertCaches = tuple[KeyValueCache, KeyValueCache]  # of high and of low


class Experts(nn.Module):
    """One model to the sampler: `high` while the noisiest shot is at `boundary` or above, `low` below.

    boundary: in [0, 1]; 0.875 for the release. The noisiest shot is the one being made: history is almost clean.
    """

    def __init__(self, high: WanTransformer3DModel, low: WanTransformer3DModel, boundary: float = 0.875) -> None:
        super().__init__()
        if not 0 <= boundary <= 1:
            raise ValueError(f"boundary={boundary} must lie in [0, 1]")
        sizes = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (high, low)]
        if sizes[0] != sizes[1]:
            differ = sorted(k for k in sizes[0] if sizes[0][k] != sizes[1].get(k))
            raise ValueError(f"the experts are not a pair: they differ in {differ}")
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
        """As `WanTransformer3DModel`; reads the noise level, which waits for the device.

        Both experts remember, each in its own cache, whatever the noise level: a later shot will ask both.
        """
        high, low = (
            partial(model, latents, sigma, *args, cache=own, remember=remember, **kwargs)
            for model, own in zip((self.high, self.low), cache or (None, None), strict=True)
        )
        if remember:
            high()
            return low()
        return high() if float(sigma.max()) >= self.boundary else low()

    def new_cache(self) -> ExpertCaches:
        """The history of a story that has not begun."""
        return self.high.new_cache(), self.low.new_cache()
