"""How storyworld's characters and camera move: pure functions of time.

An action that borders on a continuation settles to rest there, so that the next shot goes on without a jump.
"""

import math
from dataclasses import dataclass

from data.storyworld.characters import BADGES, Badge, Look, Pose

ACTIONS = ("stands", "walks", "jumps", "waves", "turns", "dances")
SETTLE_SECONDS = 0.3
REST_ARM = 0.35


@dataclass(frozen=True)
class Actor:
    """One character in one shot: where it starts, and the bounds its walk turns back at (world units)."""

    look: Look
    action: str
    x: float
    y: float
    facing: float
    bounds: tuple[float, float]
    phase: float  # seconds, so that two actors do not move in step


@dataclass(frozen=True)
class View:
    """Where the camera looks: the world point at the frame's middle, and the magnification."""

    x: float = 0.0
    y: float = 0.5
    zoom: float = 1.0


@dataclass(frozen=True)
class Timing:
    """seconds: the shot's length. settle_in, settle_out: it continues a shot, or is continued."""

    seconds: float
    settle_in: bool = False
    settle_out: bool = False

    def energy(self, time: float) -> float:
        """How much of the action shows, 0 at rest to 1."""
        ease = min(SETTLE_SECONDS, self.seconds / 2)
        rising = smoothstep(time / ease) if self.settle_in else 1.0
        falling = smoothstep((self.seconds - time) / ease) if self.settle_out else 1.0
        return rising * falling

    def distance(self, time: float) -> float:
        """The integral of energy from 0: seconds walked at full speed."""
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
    """Of smoothstep, from 0 to t in [0, 1]."""
    return t**3 - t**4 / 2


def camera_at(start: View, end: View, timing: Timing, time: float) -> View:
    """The view between `start` and `end`; eased only where a continuation borders."""
    share = timing.distance(time) / max(timing.distance(timing.seconds), 1e-6)
    return View(*(a + (b - a) * share for a, b in zip(_fields(start), _fields(end), strict=True)))


def _fields(view: View) -> tuple[float, float, float]:
    return view.x, view.y, view.zoom


def pose_at(actor: Actor, timing: Timing, time: float) -> Pose:
    """The actor's pose `time` seconds into its shot."""
    badge = BADGES[actor.look.name]
    energy = timing.energy(time)
    clock = time + actor.phase
    breath = 1 + 0.012 * math.sin(2.5 * clock)
    blink = 1 - smoothstep(1 - abs((clock % 2.7) - 1.3) / 0.12)
    rest = {"x": actor.x, "y": actor.y, "facing": _face(actor, time), "stretch": breath, "eyes": blink}
    if actor.action == "walks":
        return Pose(**rest | _walk(actor, badge, time, timing.distance(time), energy))
    if actor.action == "jumps":
        beat = (clock / 0.75) % 1
        hop = 4 * beat * (1 - beat) * energy
        stretch = breath + energy * (0.1 * hop - 0.16 * max(0.0, 1 - 8 * min(beat, 1 - beat)))
        arms = REST_ARM + 2.0 * hop
        return Pose(**rest | {"lift": 0.13 * hop, "stretch": stretch, "left_arm": arms, "right_arm": arms})
    if actor.action == "waves":
        raised = 2.45 + 0.45 * math.sin(2 * math.pi * 1.8 * clock)
        return Pose(**rest | {"right_arm": REST_ARM + (raised - REST_ARM) * energy})
    if actor.action == "turns":
        angle = math.acos(min(max(actor.facing, -1.0), 1.0)) + 2 * math.pi * timing.distance(time) / 1.8
        return Pose(**rest | {"facing": math.cos(angle)})
    if actor.action == "dances":
        swing = math.sin(2 * math.pi * 1.1 * clock) * energy
        step = abs(math.cos(2 * math.pi * 1.1 * clock)) * energy
        arms = {"left_arm": REST_ARM + 1.1 * energy + 0.9 * swing, "right_arm": REST_ARM + 1.1 * energy - 0.9 * swing}
        return Pose(**rest | arms | {"lean": 0.16 * swing, "lift": 0.03 * step, "stride": 0.6 * swing})
    return Pose(**rest)


def _face(actor: Actor, time: float, towards: float | None = None) -> float:
    """The facing on the way from the shot's first to `towards` (the nearer side if not given)."""
    if towards is None:
        towards = 1.0 if actor.facing >= 0 else -1.0
    return actor.facing + (towards - actor.facing) * smoothstep(time / SETTLE_SECONDS)


def _walk(actor: Actor, badge: Badge, time: float, distance: float, energy: float) -> dict[str, float]:
    low, high = actor.bounds
    direction = 1.0 if actor.facing >= 0 else -1.0
    # Walking to and fro between the bounds is a triangle wave of the distance covered.
    span = max(high - low, 1e-6)
    start = (actor.x - low) / span if direction > 0 else 2 - (actor.x - low) / span
    along = (start + 0.14 * badge.pace * distance / span) % 2
    x = low + span * (along if along <= 1 else 2 - along)
    turned = min(max(6 * math.sin(math.pi * along), -1.0), 1.0)  # round at the bounds
    swing = math.sin(math.pi * badge.pace * (distance + actor.phase)) * energy
    return {
        "x": x,
        "facing": _face(actor, time, turned),
        "lift": badge.bounce * abs(math.cos(math.pi * badge.pace * (distance + actor.phase))) * energy,
        "lean": 0.05 * energy * turned,
        "stride": swing,
        "left_arm": REST_ARM + 0.3 * swing,
        "right_arm": REST_ARM - 0.3 * swing,
    }
