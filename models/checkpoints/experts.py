"""Wan2.2-T2V-A14B and HoloCine: two transformers of one shape, one for high noise and one for low.

They are trained one at a time, each as a model of its own; sampling switches at the boundary, and can keep the expert
that is not in use in CPU memory.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from torch import Tensor, nn

from moc.diffusion import Flow
from moc.errors import UserError
from moc.training.checkpoint import EXPERT_FOLDERS, read_json, read_settings, root_of
from models.stream import KeyValueCache
from models.wan import WanTransformer3DModel

BOUNDARY = 0.875  # of the release
NOISE = re.compile(r"(?<![a-z])(high|low)(?=noise|[^a-z]|$)")  # in a name: no "flow", no "lower"
ExpertCaches = tuple[KeyValueCache, KeyValueCache]  # of high and of low


class Experts(nn.Module):
    """One model to the sampler: `high` while the noisiest shot is at `boundary` or above, `low` below.

    boundary: in [0, 1]. The noisiest shot is the one being made: history is almost clean.
    """

    def __init__(self, high: WanTransformer3DModel, low: WanTransformer3DModel, boundary: float = BOUNDARY) -> None:
        super().__init__()
        if not 0 <= boundary <= 1:
            raise ValueError(f"boundary={boundary} must lie in [0, 1]")
        sizes = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (high, low)]
        if sizes[0] != sizes[1]:
            differ = sorted(k for k in sizes[0] if sizes[0][k] != sizes[1].get(k))
            raise UserError(f"the experts are not a pair: they differ in {differ}")
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
            low()  # first: it made the shot before, and is still on the device where they take turns
            return high()
        return high() if float(sigma.max()) >= self.boundary else low()

    def new_cache(self) -> ExpertCaches:
        """The history of a story that has not begun."""
        return self.high.new_cache(), self.low.new_cache()

    def offload(self, device: torch.device) -> None:
        """Keeps both in CPU memory, and on `device` the one that was called last."""
        device = torch.empty(0, device=device).device  # with its index, as the hooks compare it
        _, of_high = cpu_offload_with_hook(self.high.to("cpu"), device)
        _, of_low = cpu_offload_with_hook(self.low.to("cpu"), device, of_high)
        of_high.hook.prev_module_hook = of_low


def expert_paths(path: Path) -> tuple[Path, Path] | None:
    """The high-noise and the low-noise model in a folder of both: a diffusers pipeline, the release, or two files such
    as HoloCine's full_high_noise.safetensors and full_low_noise.safetensors; None where there are not two.

    Raises UserError where there are several such pairs.
    """
    if not path.is_dir():
        return None
    pairs = [(path / high, path / low) for high, low in EXPERT_FOLDERS]
    for high in path.glob("*high_noise*.safetensors"):
        pairs.append((high, high.with_name(high.name.replace("high_noise", "low_noise"))))
    found = sorted(pair for pair in pairs if all(part.exists() for part in pair))
    if len(found) > 1:
        raise UserError(
            f"{path} holds several pairs of noise experts, {[high.name for high, _ in found]} and their counterparts: "
            "name the two of one pair (sample.py: checkpoint=HIGH low_noise_checkpoint=LOW)"
        )
    return found[0] if found else None


def read_flow(path: Path) -> Flow:
    """The noise convention of a run, a checkpoint, a pipeline or a model's folder. That of a pipeline's expert covers
    its own noise levels alone: from the pipeline's boundary_ratio on, or up to it."""
    flow, boundary = read_settings(path)[1], _boundary_ratio(root_of(path) / "model_index.json")
    high, low = zip(*EXPERT_FOLDERS, strict=True)
    if boundary is not None and path.name in high:
        return replace(flow, sigma_min=boundary)
    if boundary is not None and path.name in low:
        return replace(flow, sigma_max=boundary)
    return flow


def _boundary_ratio(file: Path) -> float | None:
    ratio = read_json(file).get("boundary_ratio") if file.is_file() else None
    if ratio is not None and not (isinstance(ratio, float) and 0 < ratio < 1):
        raise UserError(f"{file}: boundary_ratio={ratio!r} must be a number between 0 and 1; fetch it again")
    return ratio


def check_places(high: Path, low: Path) -> None:
    """Raises UserError where two experts' names say that they changed places. What their paths share says nothing."""
    said = [
        {
            word
            for part in set(own.absolute().parts) - set(other.absolute().parts)
            for word in NOISE.findall(part.lower())
        }
        for own, other in ((high, low), (low, high))
    ]
    if said == [{"low"}, {"high"}] or (low.name, high.name) in EXPERT_FOLDERS:
        raise UserError(
            f"{high} is named as the low-noise expert and {low} as the high-noise one: the high-noise expert is "
            "checkpoint, the other one low_noise_checkpoint; rename them if their names mislead"
        )
