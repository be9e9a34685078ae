"""Sublayers of a block are computed once more in backward, within a block that is recomputed itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROW_SLICES = 4  # a feed-forward network is computed in this many slices of its rows


class RecomputedSublayers(nn.Module):
    """This is a module whose sublayers are computed once more in backward, one after another, where
    `recomputes_sublayers` is set: what backward needs then is that of one sublayer at a time."""

    recomputes_sublayers = False

    def apart(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), computed as a sublayer."""
        again = self.recomputes_sublayers and torch.is_grad_enabled()
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False) if again else function(*args)

    def by_rows(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Returns function(x), computed in slices of the rows; the function takes each row by itself."""
        again = self.recomputes_sublayers and torch.is_grad_enabled()
        return torch.cat([self.apart(function, rows) for rows in x.chunk(ROW_SLICES)]) if again else function(x)
