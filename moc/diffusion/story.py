"""This module holds what sampling is asked for: the settings, a story, and how far it is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moc.diffusion.flow import draw_key
from moc.diffusion.solvers import SolverKind
from moc.errors import UserError, check_above_zero, check_least, check_seed


@dataclass(frozen=True)
class SamplingConfig:
    """These settings say how shots are sampled.

    steps: the number of steps of each shot.
    solver: how a step is taken: `euler`, or `unipc` or `dpmpp` of diffusers, which need fewer steps.
    dense_steps: how many of a shot's first steps have dense attention.
    guidance_scale: how strongly the prompt guides; 1 is without guidance. null is 5, but 1 where the checkpoint tells
        that no caption was ever dropped in its training.
    high_noise_guidance_scale: the scale of the high-noise expert of a pair; null is guidance_scale.
    guidance_interval: the lowest and the highest noise level with guidance; outside the scale is 1, and a step asks the
        model once (arXiv 2404.07724).
    lag: how long after the one before it a shot starts, in units of a whole denoising; 0 is joint, 1 shot by shot.
    history_sigma: the noise level of finished shots.
    context_shots: how many finished shots the others see at most, the latest ones, besides references, which all see;
        memory and time of a shot then do not grow with the film. null is all.
    cache: keep the keys and values of finished shots where the result is the same, as long as memory lasts.
    offload_cache: keep them in the host's memory. Each layer's come to the device while the one before it computes; the
        film is the same to the bit. null does so where the device's memory does not suffice.
    step_cache: a step takes the velocity of an earlier one where it is thought to have changed by less than this share
        (see `moc.diffusion.reuse`); null and 0 ask the model in every step.
    seed: the seed of the noise, which is drawn shot by shot.
    """

    steps: int = 50
    solver: SolverKind = SolverKind.euler
    dense_steps: int = 0
    guidance_scale: float | None = None
    high_noise_guidance_scale: float | None = None
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    lag: float = 1.0
    history_sigma: float = 0.05
    context_shots: int | None = None
    cache: bool = True
    offload_cache: bool | None = None
    step_cache: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampler.steps={self.steps} must be at least 1")
        if not 0 <= self.dense_steps <= self.steps:
            raise UserError(f"sampler.dense_steps={self.dense_steps} must lie in [0, sampler.steps={self.steps}]")
        check_least(self, "sampler", 0, "guidance_scale", "step_cache")
        check_above_zero(self, "sampler", "high_noise_guidance_scale", null="sampler.guidance_scale")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise UserError(
                f"sampler.guidance_interval={self.guidance_interval} must be [LOW, HIGH], two noise levels in [0, 1]"
            )
        if not 0 <= self.lag <= 1:
            raise UserError(f"sampler.lag={self.lag} must lie in [0, 1]: 0 is joint, 1 shot by shot")
        if not 0 <= self.history_sigma < 1:
            raise UserError(f"sampler.history_sigma={self.history_sigma} must lie in [0, 1)")
        check_least(self, "sampler", 1, "context_shots", null="all")
        check_seed(self, "sampler")

    @property
    def usual_scale(self) -> float:
        """Returns the guidance scale of shots without one of their own."""
        return 5.0 if self.guidance_scale is None else self.guidance_scale

    @property
    def keeps_history(self) -> bool:
        """Returns whether keys and values of finished shots may be kept, where attention flows strictly forward."""
        return self.cache and self.lag == 1


@dataclass(frozen=True)
class Story:
    """A story is what is to be sampled: one shot or more, of which at least one is not given.

    shapes: (C, T, H, W) of each shot's latent.
    text, negative: features [T_i, text_dim] of the global caption, then of each shot's, to steer to and away from.
    given: clean latents [C, T, H, W] of shots that are known already, by index.
    ends: clean latent frames [C, t, H, W] that shots must end in, by index. They are put there after each step, at the
        shot's noise level, and the rest of the shot is drawn to them (RePaint, arXiv 2201.09865, without its returns).
        Those of given shots count for nothing.
    guidance: the guidance scale of each shot, None where it takes the config's; empty means none has its own.
    cuts: whether a true cut begins each shot; empty means cuts everywhere.
    num_references: how many of the first shots, all given, every shot sees, whatever `context_shots` is.
    noise_keys: seed the noise of each shot (`noise_key`); empty keys it by the config's seed and the shot's index.
    Raises ValueError where these do not describe the same shots.
    """

    shapes: list[tuple[int, int, int, int]]
    text: list[Tensor]
    negative: list[Tensor]
    given: dict[int, Tensor] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)
    guidance: Sequence[float | None] = ()
    cuts: Sequence[bool] = ()
    noise_keys: Sequence[int] = ()
    num_references: int = 0

    def __post_init__(self) -> None:
        shots = len(self.shapes)
        if (len(self.text), len(self.negative)) != (shots + 1, shots + 1):
            raise ValueError(
                f"a story of {shots} shots has {len(self.text)} texts and {len(self.negative)} negative ones; it needs "
                "one for the global caption and one for each shot"
            )
        of_shots = {"cuts": self.cuts, "noise keys": self.noise_keys, "guidance scales": self.guidance}
        for name, values in of_shots.items():
            if values and len(values) != shots:
                raise ValueError(
                    f"a story of {shots} shots has {len(values)} {name}; it needs one for each shot, or none"
                )
        if not self.given.keys() < set(range(shots)):
            raise ValueError(f"shots {sorted(self.given)} of {shots} are given; at least one must be left to sample")
        if not set(range(self.num_references)) <= self.given.keys():
            raise ValueError(f"the first {self.num_references} shots are references, but not all of them are given")
        for index, latent in self.given.items():
            if tuple(latent.shape) != tuple(self.shapes[index]):
                raise ValueError(f"shot {index} is given as {tuple(latent.shape)}; its shape is {self.shapes[index]}")
        if not self.ends.keys() <= set(range(shots)):
            raise ValueError(
                f"ends are given for shots {sorted(self.ends)} of {shots}; a story has no others than its own"
            )
        for index, end in self.ends.items():
            channels, frames, *size = self.shapes[index]
            if tuple(end.shape) != (channels, min(frames, end.shape[1]), *size):
                raise ValueError(f"shot {index} of {self.shapes[index]} cannot end in {tuple(end.shape)}")


@dataclass(frozen=True)
class Progress:
    """This is how far a story is sampled: enough to go on from there. step: steps done of `num_steps`. latents: of
    every shot that has begun, noisy or finished, and of given ones; fp32 [C, T, H, W], by index. remembered: what is
    remembered of the steps of unfinished shots, by index and name. reused: how many steps took an earlier one's
    velocity."""

    step: int
    num_steps: int
    latents: dict[int, Tensor]
    remembered: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    reused: int = 0


def noise_key(seed: int, number: int) -> int:
    """Returns the seed of the noise of shot `number` in a story of `seed`."""
    return draw_key(seed, number)
