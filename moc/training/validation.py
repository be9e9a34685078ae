"""Held-out loss has fixed noise: the same batches, noise and noise levels each time, so that numbers compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moc.batch import Batch
from moc.config import MoCConfig, OwnAnchor, TextAnchor
from moc.cost import attention_cost
from moc.diffusion.flow import Flow, NoiseLevels
from moc.errors import UserError
from moc.statistics import routing_statistics
from moc.training.parallel import Parallel, gather_lists


@dataclass(frozen=True)
class Validator:
    """A validator takes the loss of held-out batches at each of `sigmas`: equal on all shots of a sample, or with
    `clean_history` on its last shot, the others clean (equal noise barely tells models that recall from those that
    do not). shares: how far through the flow's range each of `sigmas` lies; the range is all of [0, 1] but for an
    expert."""

    batches: Sequence[Batch]
    flow: Flow
    shares: Sequence[float] = (0.2, 0.5, 0.8, 0.95)
    seed: int = 0
    clean_history: bool = False

    @property
    def sigmas(self) -> list[float]:
        return [self.flow.level(share) for share in self.shares]

    def check(self, parallel: Parallel) -> None:
        """Raises UserError, on all processes, where one that must keep step with the others has no batch."""
        if parallel.is_sharded and parallel.any(not self.batches):
            raise UserError(
                f"data.validation holds out too few scenes for {parallel.data_ranks} processes with samples of their "
                f"own: each needs one where weights are sharded; set it to {parallel.data_ranks} or more, or to 0"
            )

    @torch.no_grad()
    def losses(
        self, model: nn.Module, moc: MoCConfig, parallel: Parallel, is_over: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """Sums the loss over this process's target shots at each noise level, and counts them: [num sigmas, 2].

        Where the model is sharded, a process with fewer batches than others keeps step: it computes one again.
        is_over: asked before each batch, by all processes equally often; where true, those left are left out.
        """
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(self.sigmas), 2, device=parallel.device)
        for index in range(max(gather_lists([len(self.batches)]))):
            if is_over():
                break
            is_own = index < len(self.batches)
            if not (is_own or parallel.is_sharded):
                continue
            batch = _on(self.batches[index if is_own else 0], parallel, moc)
            for row, level in zip(sums, self.sigmas, strict=True):
                levels = self._levels(level, batch)
                with parallel.autocast():
                    losses = self.flow.loss(model, batch, levels, moc, self.seed)
                target = parallel.put(levels.is_target)
                row += is_own * torch.stack([(losses * target).sum(), target.sum()])
        model.train(was_training)
        return sums

    def _levels(self, level: float, batch: Batch) -> NoiseLevels:
        if self.clean_history:
            return NoiseLevels.after_clean_history(level, batch.layout)
        return NoiseLevels.equal(level, batch.num_shots)

    @torch.no_grad()
    def routing(self, model: nn.Module, moc: MoCConfig, parallel: Parallel) -> dict[str, Any]:
        """Returns what attention did on the first held-out batch at sigma 0.8 (of an expert's range): sparsity and
        FLOPs averaged over all layers, dense ones among them; entropy and unused over those that route, and absent
        where none does. Where processes share a stream, all of them take part, and entropy and unused are means of
        their heads."""
        batch = _on(self.batches[0], parallel, moc)
        rows: list[dict[str, float]] = []

        def observe(layer: int, routes: Tensor) -> None:
            # Widths cancel in every ratio: FLOPs of attention and of routing are both proportional to heads x head dim.
            cost = attention_cost(batch.layout, moc, routes, num_heads=1, head_dim=1)
            statistics = routing_statistics(routes, batch.layout)
            rows.append(
                {
                    "sparsity": cost.sparsity,
                    "flops_of_dense": cost.flops / cost.dense_flops,
                    "entropy": statistics.entropy,
                    "unused": statistics.unused,
                }
            )

        if not moc.dense:
            levels = NoiseLevels.equal(self.flow.level(0.8), batch.num_shots)
            with parallel.autocast():
                self.flow.loss(model, batch, levels, moc, self.seed, on_routes=observe)
        if not rows:
            return {"sparsity": 0.0, "flops_of_dense": 1.0}
        sums = {key: sum(row[key] for row in rows) for key in rows[0]} | {"rows": len(rows)}
        of_all_heads = parallel.sum_over_heads(parallel.put(torch.tensor(list(sums.values()), dtype=torch.float64)))
        *values, count = of_all_heads.tolist()
        means = {key: value / count for key, value in zip(rows[0], values, strict=True)}
        routed = len(rows) / (len(rows) + moc.dense_layers)  # the share of layers that route
        whole = {"sparsity": means["sparsity"] * routed, "flops_of_dense": 1 + (means["flops_of_dense"] - 1) * routed}
        return means | whole


def rivals(moc: MoCConfig) -> dict[str, MoCConfig]:
    """Returns a checkpoint's attention among its rivals. In "own shot only" nothing carries the video of another shot
    onward: no route, no dense layer, no other shot's text."""
    routed = replace(moc, dense=False)
    own = replace(routed, top_k=0, dense_layers=0, own_anchor=OwnAnchor.shot, text_anchor=TextAnchor.global_and_own)
    return {"dense": replace(moc, dense=True), "MoC": routed, "own shot only": own}


def _on(batch: Batch, parallel: Parallel, moc: MoCConfig) -> Batch:
    return batch.rechunk(moc.chunk_tokens).to(parallel.device)
