"""This module moves storyworld's characters and camera by pure functions of time.

Where a shot continues another, actions come to rest, so that the next shot goes on without a jump.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from data.storyworld.characters import BADGES, Look, Pose

SETTLE_SECONDS = 0.3
REST_ARM = 0.35


@dataclass(frozen=True)
class Actor:
    """An actor is one character in a shot: where it starts, and the bounds where its walk turns back (world units)."""

    look: Look
    action: str
    x: float
    y: float
    facing: float
    bounds: tuple[float, float]
    phase: float  # seconds, so that two actors do not move in step


CAMERAS = {
    "static": "Static camera.", "pan left": "Pan left.", "pan right": "Pan right.",
    "zoom in": "Zoom in.", "zoom out": "Zoom out.",
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """A view says where the camera looks: the world point at the frame's middle, and the magnification."""

    x: float = 0.0
    y: float = 0.5
    zoom: float = 1.0


@dataclass(frozen=True)
class Timing:
    """A timing says when things happen in a shot. seconds: its length. settle_in, settle_out: whether it continues a
    shot, or is continued."""

    seconds: float
    settle_in: bool = False
    settle_out: bool = False

    def energy(self, time: float) -> float:
        """Returns how much of the action shows, 0 at rest to 1."""
        ease = min(SETTLE_SECONDS, self.seconds / 2)
        rising = smoothstep(time / ease) if self.settle_in else 1.0
        falling = smoothstep((self.seconds - time) / ease) if self.settle_out else 1.0
        return rising * falling

    def distance(self, time: float) -> float:
        """Returns the integral of energy from 0: seconds walked at full speed."""
        ease = min(SETTLE_SECONDS, self.seconds / 2)
        covered = time
        if self.settle_in:
            covered -= ease * (0.5 if time >= ease else time / ease - _integral(time / ease))
        if self.settle_out and time > self.seconds - ease:
            left = (self.seconds - time) / ease
            covered -= ease * (0.5 - left + _integral(left))
        return covered


def smoothstep(t: float) -> float:
    t = min(max(t, 0.0), 1.0)
    return t * t * (3 - 2 * t)


def _integral(t: float) -> float:
    """Returns the integral of smoothstep from 0 to t in [0, 1]."""
    return t**3 - t**4 / 2


def camera_at(start: View, end: View, timing: Timing, time: float) -> View:
    """Returns the view between `start` and `end`; eased only where a continuation borders."""
    share = timing.distance(time) / max(timing.distance(timing.seconds), 1e-6)
    return View(*(a + (b - a) * share for a, b in zip(_fields(start), _fields(end), strict=True)))


def _fields(view: View) -> tuple[float, float, float]:
    return view.x, view.y, view.zoom


@dataclass(frozen=True)
class Moment:
    """A moment is a point in an actor's time. time: into the shot. clock: its own, for what repeats. energy, distance:
    those of Timing."""

    time: float
    clock: float
    energy: float
    distance: float


def pose_at(actor: Actor, timing: Timing, time: float) -> Pose:
    """Returns the actor's pose `time` seconds into its shot."""
    moment = Moment(time, time + actor.phase, timing.energy(time), timing.distance(time))
    rest = Pose(
        actor.x,
        actor.y,
        facing=_face(actor, time, _side(actor)),
        stretch=1 + 0.012 * math.sin(2.5 * moment.clock),  # breath
        eyes=1 - smoothstep(1 - abs((moment.clock % 2.7) - 1.3) / 0.12),  # blink
    )
    return ACTIONS[actor.action](rest, actor, moment)


def _side(actor: Actor) -> float:
    return 1.0 if actor.facing >= 0 else -1.0


def _face(actor: Actor, time: float, towards: float) -> float:
    """Returns the facing on its way to `towards`: a continued shot may begin in the middle of a turn."""
    return actor.facing + (towards - actor.facing) * smoothstep(time / SETTLE_SECONDS)


def _stand(rest: Pose, actor: Actor, moment: Moment) -> Pose:
    return rest


def _walk(rest: Pose, actor: Actor, moment: Moment) -> Pose:
    badge = BADGES[actor.look.name]
    low, high = actor.bounds
    # Walking to and fro between the bounds is a triangle wave of the distance covered.
    span = high - low
    start = (actor.x - low) / span if _side(actor) > 0 else 2 - (actor.x - low) / span
    along = (start + 0.14 * badge.pace * moment.distance / span) % 2
    side = min(max(6 * math.sin(math.pi * along), -1.0), 1.0)  # the figure turns round near the bounds
    step = math.pi * badge.pace * (moment.distance + actor.phase)
    swing = math.sin(step) * moment.energy
    return replace(
        rest,
        x=low + span * (along if along <= 1 else 2 - along),
        facing=_face(actor, moment.time, side),
        lift=badge.bounce * abs(math.cos(step)) * moment.energy,
        lean=0.05 * side * moment.energy,
        stride=swing,
        left_arm=REST_ARM + 0.3 * swing,
        right_arm=REST_ARM - 0.3 * swing,
    )


def _jump(rest: Pose, actor: Actor, moment: Moment) -> Pose:
    beat = (moment.clock / 0.8) % 1
    hop = 4 * beat * (1 - beat) * moment.energy
    squat = max(0.0, 1 - 8 * min(beat, 1 - beat)) * moment.energy
    arms = REST_ARM + 2.0 * hop
    stretch = rest.stretch + 0.1 * hop - 0.14 * squat
    return replace(rest, lift=0.12 * hop, stretch=stretch, left_arm=arms, right_arm=arms)


def _wave(rest: Pose, actor: Actor, moment: Moment) -> Pose:
    raised = 2.45 + 0.45 * math.sin(2 * math.pi * 1.8 * moment.clock)
    return replace(rest, right_arm=REST_ARM + (raised - REST_ARM) * moment.energy)


def _turn(rest: Pose, actor: Actor, moment: Moment) -> Pose:
    start = math.acos(min(max(actor.facing, -1.0), 1.0))
    return replace(rest, facing=math.cos(start + 2 * math.pi * moment.distance / 1.8))


def _dance(rest: Pose, actor: Actor, moment: Moment) -> Pose:
    beat = 2 * math.pi * 1.1 * moment.clock
    swing, step = math.sin(beat) * moment.energy, abs(math.cos(beat)) * moment.energy
    arms = REST_ARM + 1.1 * moment.energy
    return replace(
        rest, lean=0.16 * swing, lift=0.03 * step, stride=0.6 * swing, left_arm=arms + 0.9 * swing,
        right_arm=arms - 0.9 * swing,
    )  # fmt: skip


ACTIONS: dict[str, Callable[[Pose, Actor, Moment], Pose]] = {
    "stands": _stand, "walks": _walk, "jumps": _jump, "waves": _wave, "turns": _turn, "dances": _dance,
}  # fmt: skip
