"""This module plans storyworld's scenes: who, where, what happens shot by shot, and the captions, from a closed
vocabulary."""

import re
from dataclasses import dataclass, replace

import numpy as np

from data.manifest import CUT_PREFIX
from data.storyworld.accessories import ACCESSORIES
from data.storyworld.characters import BADGES, COLOURS, PATTERNS, SIZES, Look
from data.storyworld.config import Mode, StoryworldConfig
from data.storyworld.motion import ACTIONS, CAMERAS, Actor, Timing, View, camera_at, pose_at
from data.storyworld.places import PLACES

STORIES = ("journey", "game", "search")
CLOSE, PAN = 1.25, 0.16  # zoom of a close view; half a pan's way, world units


@dataclass(frozen=True)
class Shot:
    """A shot says where a scene is, for how long, how the camera goes from its first view to its last, and who acts."""

    place: str
    cut: bool
    frames: int
    timing: Timing
    camera: str
    start_view: View
    end_view: View
    actors: tuple[Actor, ...]
    clock: float  # seconds since the scene began, for what drifts in the air
    caption: str


@dataclass(frozen=True)
class Recall:
    """A recall says that a name returns in shot `shot`; its looks were shown in shots `shown_in`, last `distance` shots
    ago."""

    shot: int
    name: str
    shown_in: tuple[int, ...]
    distance: int


@dataclass(frozen=True)
class Scene:
    """A scene says what is to be drawn: the looks of its cast, its shots, captions, and which names return."""

    looks: tuple[Look, ...]
    shots: tuple[Shot, ...]
    caption: str
    recalls: tuple[Recall, ...]
    occluders: bool  # whether tall things may hide a character
    seed: tuple[int, int]  # seeds all that is drawn at random in it
    paint_seed: tuple[int, ...]  # seeds the painting of its places


def plan_scene(config: StoryworldConfig, index: int) -> Scene:
    """Returns scene `index` of the world that `config.seed` names, the same in any order of calls."""
    seed = (config.seed, index)
    rng = np.random.default_rng(seed)
    names = rng.permutation(config.names or list(BADGES))[: config.characters].tolist()
    looks = {name: _draw_look(_look_draws(rng, name, config), name, config.mode) for name in names}
    if config.look_alikes:
        # Colour alone must not say who it is: one more has the first's fur, and one its outfit.
        for name, attribute in zip(names[1:], ("fur", "outfit"), strict=False):
            looks[name] = replace(looks[name], **{attribute: getattr(looks[names[0]], attribute)})
    num_shots = int(rng.choice(config.shots))
    cuts, casts = _plan_casts(rng, config, names, num_shots)
    places = _plan_places(rng, config, cuts)
    story = str(rng.choice(STORIES))
    shots: list[Shot] = []
    for i, (cut, cast, place) in enumerate(zip(cuts, casts, places, strict=True)):
        frames = int(rng.choice(config.frames_per_shot))
        last = i + 1 == num_shots
        timing = Timing(frames / config.fps, settle_in=not cut, settle_out=not last and not cuts[i + 1])
        before = None if cut else shots[-1]
        clock = shots[-1].clock + shots[-1].timing.seconds if shots else 0.0
        aspect = config.size[1] / config.size[0]
        actors = _direct(rng, [looks[name] for name in cast], aspect, before)
        camera, start_view, end_view = _film(rng, config, before)
        caption = shot_caption(place, [(actor.look.name, actor.action) for actor in actors], camera, cut)
        shots.append(Shot(place, cut, frames, timing, camera, start_view, end_view, actors, clock, caption))
    shown = list(dict.fromkeys(name for cast in casts for name in cast))
    caption = global_caption([looks[name] for name in shown], list(dict.fromkeys(places)), story, config.mode)
    return Scene(
        tuple(looks.values()),
        tuple(shots),
        caption,
        _find_recalls(casts, cuts),
        config.mode != Mode.recall,
        seed,
        (config.seed,) if config.familiar else seed,
    )


def _look_draws(rng: np.random.Generator, name: str, config: StoryworldConfig) -> np.random.Generator:
    """Returns where a name's look comes from: the scene's draws, or in a familiar world the name's own, the same for
    every seed, so that a script can tell it."""
    return np.random.default_rng((0, list(BADGES).index(name))) if config.familiar else rng


def _draw_look(rng: np.random.Generator, name: str, mode: Mode) -> Look:
    fur, outfit = (str(colour) for colour in rng.choice(list(COLOURS), 2))
    if mode == Mode.recall:
        return Look(name, fur, outfit)
    pattern, accessory, size = (str(rng.choice(values)) for values in (list(PATTERNS), list(ACCESSORIES), list(SIZES)))
    return Look(name, fur, outfit, pattern, accessory, size)


def _plan_casts(rng, config: StoryworldConfig, names: list[str], num_shots: int) -> tuple[list[bool], list[list[str]]]:
    """Returns which shots begin with a true cut, and the names in each shot."""
    if config.mode == Mode.recall:
        # The last shot's first name was shown in exactly one earlier shot, at a distance drawn evenly.
        returning, *others = names
        shown = num_shots - 1 - int(rng.integers(1, num_shots))
        casts = []
        for i in range(num_shots):
            cast = rng.permutation(others).tolist()
            if i in (shown, num_shots - 1):
                cast.insert(0, returning)
            casts.append(cast[: config.characters_per_shot])
        return [True] * num_shots, casts
    cuts = [True, *(rng.random(num_shots - 1) >= config.continuation).tolist()]
    casts = []
    for cut in cuts:
        casts.append(rng.permutation(names)[: config.characters_per_shot].tolist() if cut else casts[-1])
    return cuts, casts


def _plan_places(rng: np.random.Generator, config: StoryworldConfig, cuts: list[bool]) -> list[str]:
    """Returns the place of each shot: a true cut moves to another of the scene's places, if it has several."""
    stock = rng.permutation(config.places or list(PLACES))[: config.places_per_scene].tolist()
    places = [stock[0]]
    for cut in cuts[1:]:
        elsewhere = [place for place in stock if place != places[-1]]
        places.append(str(rng.choice(elsewhere)) if cut and elsewhere else places[-1])
    return places


def _direct(rng: np.random.Generator, cast: list[Look], aspect: float, before: Shot | None) -> tuple[Actor, ...]:
    """Gives each of the cast an action and a place on the stage; after a continuation, where they were."""
    stage, gap = 0.33 * aspect, 0.06 * aspect * (len(cast) > 1)
    actors = []
    for i, look in enumerate(cast):
        low = -stage + 2 * stage * i / len(cast)
        bounds = (low + gap, low + 2 * stage / len(cast) - gap)
        action = str(rng.choice(list(ACTIONS)))
        facing = float(rng.choice((-1.0, 1.0)))
        phase = float(rng.uniform(0, 5))
        if before:
            was = before.actors[i]
            rest = pose_at(was, before.timing, before.timing.seconds)
            others = [other for other in ACTIONS if other != was.action]
            moved = replace(was, x=rest.x, facing=rest.facing, action=str(rng.choice(others)))
            actors.append(replace(moved, phase=was.phase + before.timing.seconds))
            continue
        middle, half = sum(bounds) / 2, (bounds[1] - bounds[0]) / 2
        # A walker starts where it has way to go; the others stand nearer the middle.
        x = middle - 0.7 * half * facing if action == "walks" else middle + 0.5 * half * float(rng.uniform(-1, 1))
        actors.append(Actor(look, action, x, float(rng.uniform(0.83, 0.89)), facing, bounds, phase))
    return tuple(actors)


def _film(rng: np.random.Generator, config: StoryworldConfig, before: Shot | None) -> tuple[str, View, View]:
    """Returns a camera move and its two ends; after a continuation it starts where the shot before left off."""
    sway = 0.0 if config.familiar else 0.06
    start = before.end_view if before else View(x=float(rng.uniform(-sway, sway)))
    camera = str(rng.choice(config.cameras or list(CAMERAS)))
    if before:
        possible = {"static": True, "pan left": start.x > -PAN / 2, "pan right": start.x < PAN / 2,
                    "zoom in": start.zoom < 1.1, "zoom out": start.zoom > 1.2}  # fmt: skip
        able = [name for name, can in possible.items() if can]
        camera = str(rng.choice([name for name in able if name in (config.cameras or able)] or ["static"]))
    else:
        start = start_of(camera, start.x)
    return camera, start, end_of(camera, start)


def start_of(camera: str, x: float = 0.0) -> View:
    """Returns where a camera's move begins after a cut; x: of one that does not pan."""
    pans = {"pan left": PAN, "pan right": -PAN}
    return View(x, 0.55, CLOSE) if camera == "zoom out" else View(pans.get(camera, x))


def end_of(camera: str, start: View) -> View:
    return {
        "static": start, "pan left": replace(start, x=-PAN), "pan right": replace(start, x=PAN),
        "zoom in": View(start.x / 2, 0.55, CLOSE), "zoom out": View(start.x, 0.5, 1.0),
    }[camera]  # fmt: skip


def _find_recalls(casts: list[list[str]], cuts: list[bool]) -> tuple[Recall, ...]:
    """Returns every return of a name after a true cut."""
    recalls = []
    for i, cast in enumerate(casts):
        for name in cast:
            shown = tuple(j for j in range(i) if name in casts[j])
            if cuts[i] and shown:
                recalls.append(Recall(i, name, shown, i - shown[-1]))
    return tuple(recalls)


def global_caption(looks: list[Look], places: list[str], story: str, mode: Mode) -> str:
    """Returns the scene's caption in the form of LCT 8: characters by name, environment, story."""
    people = " ".join(f"{look.name}: {_describe(look, mode)}." for look in looks)
    return f"[character] {people} [environment] {', '.join(places)}. [story] A {story}."


def _describe(look: Look, mode: Mode) -> str:
    animal = BADGES[look.name].animal
    if mode == Mode.recall:
        return animal
    clothes = [f"{look.pattern} {look.outfit} coat", *filter(None, [look.accessory])]
    return ", ".join([f"{look.size} {look.fur} {animal}", *clothes])


def shot_caption(place: str, doings: list[tuple[str, str]], camera: str, cut: bool) -> str:
    """Returns a shot's caption. doings: (name, action) of each character."""
    acts = " and ".join(f"{name} {action}" for name, action in doings)
    return f"{CUT_PREFIX + ' ' if cut else ''}In the {place}, {acts}. {CAMERAS[camera]}"


def vocabulary() -> list[str]:
    """Returns every word and mark a caption may hold, as written there, sorted."""
    animals = [badge.animal for badge in BADGES.values()]
    frame = f"{CUT_PREFIX} [character] : . [environment] , [story] A coat In the and"
    values = (BADGES, animals, COLOURS, PATTERNS, ACCESSORIES, SIZES, ACTIONS, PLACES, STORIES, CAMERAS.values())
    text = " ".join([frame, *(word for some in values for word in some)])
    return sorted(set(words_of(text)))


def words_of(caption: str) -> list[str]:
    """Returns the caption split into words and single marks."""
    return re.findall(r"\w+|[^\w\s]", caption)


def place_of_caption(prompt: str) -> str:
    """Returns the place a shot's prompt names. Raises ValueError if it names none, or several."""
    named = [place for place in PLACES if place in words_of(prompt.lower())]
    if len(named) != 1:
        raise ValueError(f"prompt {prompt!r} names {named or 'no place'}; name one of {', '.join(PLACES)}")
    return named[0]


def view_at(shot: Shot, time: float) -> View:
    return camera_at(shot.start_view, shot.end_view, shot.timing, time)
