"""A `Survey` tells what attention did in one training step and what the step computed. It counts on the device while
the step runs and is read when it is over, so that the step itself waits for nothing."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moc.config import MoCConfig
from moc.cost import attention_cost
from moc.layout import ShotLayout
from moc.statistics import chunk_counts, routes_by_distance

# Dense bf16 FLOPs a second, as the makers say, by a word of the GPU's name; the first that fits counts.
PEAK_FLOPS = {
    "B300": 2.25e15, "B200": 2.25e15, "GB200": 2.25e15, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A10G": 70e12, "A10": 125e12, "L4": 121e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns how many FLOPs a second the device can do at most, in bf16; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)


@dataclass
class _Forward:
    """This counts, in one forward, how often the queries of each group chose each chunk, int64 [G, M], over its
    `layers` that route and all their `heads`."""

    layout: ShotLayout
    counts: Tensor | int = 0
    layers: int = 0
    heads: int = 1

    def observe(self, layer: int, routes: Tensor) -> None:
        self.counts, self.layers, self.heads = (
            chunk_counts(routes, self.layout) + self.counts,
            self.layers + 1,
            len(routes),
        )


@dataclass
class Survey:
    """A survey tells routing, density and FLOPs of a step, on this process's share of it. model: a `StreamModel`,
    unwrapped."""

    model: Any
    moc: MoCConfig
    forwards: list[_Forward] = field(default_factory=list)
    linear_flops: float = 0.0

    @contextmanager
    def forward(self, layout: ShotLayout) -> Iterator[Callable[[int, Tensor], None]]:
        """Watches a forward over a stream; yields what to give it as `on_routes`."""
        self.forwards.append(_Forward(layout))
        linears = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        hooks = [linear.register_forward_hook(self._add_linear) for linear in linears]
        try:
            yield self.forwards[-1].observe
        finally:
            for hook in hooks:
                hook.remove()

    def _add_linear(self, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Counts the forward and, where gradients are taken, that of the input and of the weight if it is trained."""
        times = 2 + linear.weight.requires_grad if torch.is_grad_enabled() else 1
        self.linear_flops += 2 * inputs[0].numel() * linear.out_features * times

    def read(self, tokens_per_second: float, dtype: torch.dtype) -> dict[str, float]:
        """Returns what was measured. density: attended pairs of those of dense attention, over all layers.
        flops_per_token: of the model's linears and of attention over the attended pairs, forward and backward, nothing
        computed twice counted twice. mfu: what share that is of the device's peak, where it is known. routes/back_2:
        the share of the routes that go two shots back.

        tokens_per_second: of this process. dtype: of the forward. Waits for the device.
        """
        attended = dense = 0.0
        sharing = self.model.exchange.size if self.model.exchange else 1  # processes that share the tokens
        flops, by_distance = self.linear_flops * sharing, Counter[int]()
        for forward in self.forwards:
            layout, layers = forward.layout.to("cpu"), len(self.model.blocks)
            cost = attention_cost(layout, self.moc, None, num_heads=1, head_dim=self.model.attention_dim)
            pairs = cost.dense * (layers - forward.layers) + cost.attended * forward.layers
            if forward.layers:
                counts = torch.as_tensor(forward.counts).cpu().double()
                pairs += float((counts @ layout.chunk_cu_seqlens.diff().double()).sum()) / forward.heads
                by_distance.update(routes_by_distance(counts, layout))
            attended, dense = attended + pairs, dense + cost.dense * layers
            flops += 3 * pairs * cost.flops_per_pair + cost.routing_flops * forward.layers
        tokens, routes = sum(forward.layout.num_tokens for forward in self.forwards), sum(by_distance.values())
        shares = {f"routes/back_{distance}": number / routes for distance, number in sorted(by_distance.items())}
        peak = peak_flops(self.forwards[0].layout.device, dtype)
        use = {"mfu": flops / tokens * tokens_per_second / (peak * sharing)} if peak else {}
        return {"density": attended / dense, "flops_per_token": flops / tokens} | use | shares
