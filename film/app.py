"""This module shows a studio as a page for the browser, made with gradio (`pip install -e '.[app]'`)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from jinja2 import Environment

from data.documents import read_text
from film.folder import FilmFolder
from film.page import data_url
from film.presentation import Stills
from film.studio import State, Studio
from moc.counts import count_of
from moc.errors import UserError

EXAMPLE = """title: A walk
global: "[character] Fen: big blue fox, white coat. [environment] town, desert. [story] A walk."
shots:
  - {prompt: "In the town, Fen walks.", seconds: 2}
  - {prompt: "In the town, Fen waves.", seconds: 2, cut: false}
  - {prompt: "In the desert, Fen dances.", seconds: 2}
"""
_STYLE = """
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden; cursor: pointer;
        background: var(--background-fill-secondary); text-align: left; padding: 0; font: inherit; color: inherit;
        display: flex; flex-direction: column; }
.card:hover, .card:focus-visible, .card.chosen { border-color: var(--color-accent); outline: none; }
.card.chosen { box-shadow: 0 0 0 1px var(--color-accent); }
.card .still { aspect-ratio: 16 / 9; background: var(--border-color-primary) center / cover; width: 100%; }
.card p { margin: 0; padding: 8px 12px; overflow-wrap: anywhere; }
.card .head { display: flex; justify-content: space-between; font-size: 12px; opacity: .75; padding-bottom: 0;
              width: 100%; box-sizing: border-box; }
.status { display: grid; gap: 6px; min-height: 46px; align-content: center; }
.status progress { width: 100%; height: 8px; appearance: none; border: 0; }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 4px; }
.status progress::-webkit-progress-value { background: var(--color-accent); border-radius: 4px; }
.status progress::-moz-progress-bar { background: var(--color-accent); border-radius: 4px; }
.cost { white-space: pre-wrap; font-size: 12px; margin: 0; }
"""
_SAME = gr.skip()  # this output leaves a component as it is
_HTML = Environment(autoescape=True)
_CARDS = _HTML.from_string(
    """<div class="cards">{% for card in cards %}
<button class="card" data-number="{{ card.number }}" data-start="{{ card.start }}" title="play it, and make it anew">
<div class="still"{% if card.still %} style="background-image: url({{ card.still }})"{% endif %}></div>
<p class="head"><b>{{ card.number }}</b>
<span>{{ card.beginning }} · {{ card.seconds }} s{{ card.seed }}</span></p>
<p>{{ card.prompt }}</p></button>{% endfor %}</div>"""
)
_STATUS = _HTML.from_string(
    """<div class="status"><span>{{ text }}</span>
{% if done is not none %}<progress value="{{ done }}"></progress>{% endif %}</div>"""
)
_COST = _HTML.from_string('<pre class="cost">{{ text }}</pre>')
# A click on a card chooses its shot to be made anew, as if its number had been written, and plays the film from there.
_CHOOSE = """() => document.addEventListener('click', event => {
  const card = event.target.closest('.card');
  if (!card) return;
  document.querySelectorAll('.card.chosen').forEach(other => other.classList.remove('chosen'));
  card.classList.add('chosen');
  const number = document.querySelector('#number input'), film = document.querySelector('#film video');
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(number, card.dataset.number);
  number.dispatchEvent(new Event('input', {bubbles: true}));
  if (film) film.currentTime = Number(card.dataset.start);
})"""


class FilmControls(NamedTuple):
    """These components hold what to film, and show how filming goes."""

    name: gr.Dropdown
    script: gr.Code
    upload: gr.UploadButton
    added: gr.UploadButton
    steps: gr.Number
    guidance: gr.Number
    check: gr.Button
    preview: gr.Button
    generate: gr.Button
    stop: gr.Button
    status: gr.HTML
    cost: gr.HTML


class RedoControls(NamedTuple):
    """These components make a shot of a film anew, and show its two newest takes."""

    number: gr.Number
    seed: gr.Number
    prompt: gr.Textbox
    redo: gr.Button
    before: gr.Video
    back: gr.Button
    now: gr.Video


def build_app(studio: Studio) -> gr.Blocks:
    """Builds the page. It shows what is in the studio's folder, and does what `Studio` does."""
    with gr.Blocks(title="Storyboard", analytics_enabled=False) as app:
        gr.Markdown("# Storyboard\nWrite a story shot by shot, see what it costs, film it, make single shots anew.")
        with gr.Row():
            with gr.Column(scale=2):
                controls = _film_controls(studio)
            with gr.Column(scale=3):
                film = gr.Video(label="Film", interactive=False, elem_id="film")
                cards = gr.HTML(elem_id="cards")
                with gr.Accordion("Make a shot anew: click on its card", open=True):
                    redo_controls = _redo_controls()
                files = gr.Files(label="Download", interactive=False, elem_id="files")
        _connect(Callbacks(studio), controls, redo_controls, [film, cards, files])
        app.load(lambda: gr.update(choices=studio.names()), None, controls.name)
    return app


def _film_controls(studio: Studio) -> FilmControls:
    name = gr.Dropdown(studio.names(), value=None, label="Film", allow_custom_value=True, elem_id="name")
    script = gr.Code(EXAMPLE, language="yaml", label="Script", lines=14, max_lines=24, elem_id="script",
                     wrap_lines=True)  # fmt: skip
    with gr.Row():
        upload = gr.UploadButton("Load a script", file_types=[".yaml", ".yml", ".json"], size="sm")
        added = gr.UploadButton("Add pictures, videos", file_count="multiple", size="sm", elem_id="added")
    with gr.Row():
        sampler = studio.filmmaker.sampler
        steps = gr.Number(sampler.steps, label="Steps", precision=0, minimum=1, elem_id="steps")
        guidance = gr.Number(sampler.guidance_scale, label="Guidance", minimum=0, elem_id="guidance")
    with gr.Row():
        check = gr.Button("Save and estimate", elem_id="check")
        preview = gr.Button(f"Preview, {count_of(studio.preview_steps, 'step')}", elem_id="preview")
        generate = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    status = gr.HTML(elem_id="status")
    with gr.Accordion("Estimate", open=True):
        cost = gr.HTML(elem_id="cost")
    return FilmControls(name, script, upload, added, steps, guidance, check, preview, generate, stop, status, cost)


def _redo_controls() -> RedoControls:
    with gr.Row():
        number = gr.Number(1, label="Shot", precision=0, minimum=1, elem_id="number")
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, elem_id="seed")
    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
    redo = gr.Button("Make this shot anew", elem_id="redo")
    with gr.Row():
        with gr.Column():
            before = gr.Video(label="The take before", interactive=False, elem_id="before")
            back = gr.Button("Take its prompt and seed", size="sm", elem_id="back")
        now = gr.Video(label="This take", interactive=False, elem_id="now")
    return RedoControls(number, seed, prompt, redo, before, back, now)


def _connect(callbacks: "Callbacks", controls: FilmControls, redo_controls: RedoControls, shown: list[Any]) -> None:
    """Connects components to callbacks. shown: the components of a film, which are its video, cards and files."""
    name, number, status = controls.name, redo_controls.number, controls.status
    takes = [redo_controls.before, redo_controls.now]
    _, cards, _ = shown
    name.change(_guarded(callbacks.open_script), name, [controls.script, number, redo_controls.prompt, *shown, *takes])
    controls.upload.upload(_guarded(lambda file: read_text(Path(file))), controls.upload, controls.script)
    controls.added.upload(_guarded(callbacks.add), controls.added, status)
    redo_controls.back.click(
        _guarded(callbacks.take_before), [name, number], [redo_controls.prompt, redo_controls.seed]
    )
    number.input(_guarded(callbacks.choose), [name, number], [redo_controls.prompt, *takes])
    alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # one call at a time uses the model
    asked = [name, controls.script, controls.steps, controls.guidance]
    controls.check.click(_guarded(callbacks.save), asked, [name, controls.script, controls.cost, cards], **alone)
    anew = [name, number, redo_controls.prompt, redo_controls.seed]
    running: list[Any] = [
        controls.generate.click(_guarded_generator(callbacks.film_script), asked, [status, *shown], **alone),
        controls.preview.click(_guarded_generator(callbacks.film_preview), asked, [status, *shown], **alone),
        redo_controls.redo.click(
            _guarded_generator(callbacks.film_again), anew, [status, *shown, *takes, controls.script], **alone
        ),
    ]
    stopped = "stopped; what is finished is kept, and generating goes on from there"
    controls.stop.click(lambda: _status(stopped), None, status, cancels=running)


class Callbacks:
    """These are the callbacks of the page. Each takes the values of some components and returns those of others."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def open_script(self, name: str) -> tuple[Any, ...]:
        """Shows a film, and its first shot to be made anew: another film's number means another shot. Under a new name
        the script may be kept; nothing is left of the film before."""
        if name not in self.studio.names():
            return _SAME, 1, "", None, "", None, None, None
        first = self.studio.read(name).shots[0].prompt
        return self.studio.text(name), 1, first, *_film(self.studio, name), *_takes(self.studio, name, 1)

    def save(self, name: str, text: str, *settings: Any) -> tuple[Any, ...]:
        text = self.studio.save(name, text)
        told = _COST.render(text=self.studio.estimate(name, **_sampling(*settings)))
        return gr.update(choices=self.studio.names(), value=name), text, told, _cards(self.studio, name)

    def add(self, files: list[str]) -> str:
        names = [self.studio.add(Path(file)) for file in files]
        return _status(f"a script may now name {', '.join(names)}, such as `image: {names[0]}`")

    def choose(self, name: str, number: int | None) -> tuple[Any, ...]:
        chosen = _filled(number, "Shot")
        return self.studio.shot(name, chosen).prompt, *_takes(self.studio, name, chosen)

    def take_before(self, name: str, number: int | None) -> tuple[Any, ...]:
        return self.studio.before(name, _filled(number, "Shot"))

    def film_script(self, name: str, text: str, *settings: Any) -> Generator[tuple[Any, ...]]:
        self.studio.save(name, text)
        making = self.studio.make(name, **_sampling(*settings))
        yield from _follow(making, lambda _: _film(self.studio, name), cards=lambda: _cards(self.studio, name))

    def film_preview(self, name: str, text: str, *settings: Any) -> Generator[tuple[Any, ...]]:
        self.studio.save(name, text)
        making = self.studio.preview(name, **_sampling(*settings))
        yield from _follow(making, lambda film: (str(film.path / "video.mp4"), _SAME, _SAME), "previewed")

    def film_again(self, name: str, number: int | None, prompt: str, seed: int | None) -> Generator[tuple[Any, ...]]:
        chosen = _filled(number, "Shot")
        making = self.studio.redo(name, chosen, prompt, _filled(seed, "Seed"))
        for told in _follow(making, lambda _: _film(self.studio, name)):
            done = told[3] is not _SAME
            yield (*told, *(_takes(self.studio, name, chosen) if done else (_SAME, _SAME)),
                   self.studio.text(name) if done else _SAME)  # fmt: skip


def _sampling(steps: int | None, guidance: float | None) -> dict[str, Any]:
    return {"steps": _filled(steps, "Steps"), "guidance_scale": _filled(guidance, "Guidance")}


def launch(studio: Studio, port: int) -> None:
    """Serves the page on this machine alone, out of the studio's folder alone."""
    app = build_app(studio).queue(default_concurrency_limit=1)
    theme = gr.themes.Soft(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    app.launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True,
        allowed_paths=[str(studio.folder)], theme=theme, css=_STYLE, js=_CHOOSE,
    )  # fmt: skip


def _follow(
    states: Iterator[State],
    end: Callable[[FilmFolder], tuple[Any, ...]],
    done: str = "filmed",
    cards: Callable[[], Any] = lambda: _SAME,
) -> Iterator[tuple[Any, ...]]:
    """Yields what to show of a film in the making: how far it is, its newest shot, and the cards of its shots if there
    is a new one; then the whole."""
    num_shots, first = 0, None
    for state in states:
        shown = _SAME, _SAME
        if len(state.shots) > num_shots:
            num_shots, shown = len(state.shots), (str(state.shots[-1]), cards())
        first = first or (state.done and (state.done, time.monotonic()))
        text = f"{state.done:.0%} of the steps, {num_shots} of {count_of(state.num_shots, 'shot')}"
        yield _status(text + _left(state.done, first), state.done), *shown, _SAME
    yield (_status(done), *end(state.folder))


def _left(done: float, first: Any) -> str:
    """Says how long the rest takes at the pace since `first`: the share then done, and when."""
    if not first or not first[0] < done < 1:
        return ""
    seconds = (time.monotonic() - first[1]) * (1 - done) / (done - first[0])
    return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} minutes left"


def _status(text: str, done: float | None = None) -> str:
    """Returns what is told of the work, with a bar of the share that is done."""
    return _STATUS.render(text=text, done=done)


def _film(studio: Studio, name: str) -> tuple[Any, Any, Any]:
    """Returns the video, the cards and the files of a film, as far as they are there."""
    folder = studio.film(name)
    files = [str(path) for path in [*folder.files(), folder.path / "metadata.json"] if path.exists()]
    video = folder.path / "video.mp4"
    return (str(video) if folder.is_finished else None), _cards(studio, name), files or None


def _cards(studio: Studio, name: str) -> str:
    script, folder, start = studio.read(name), studio.film(name), 0.0
    cards = []
    for number, shot in enumerate(script.shots, start=1):
        video = folder.shot(number)
        still, seconds = "", shot.seconds
        if video.exists():
            still, num_frames = _made(folder.path, number, video.stat().st_mtime_ns)
            seconds = num_frames / script.fps  # the film has whole frames, and the shots after it begin there
        cards.append({"number": number, "beginning": shot.beginning, "seconds": f"{shot.seconds:.3g}",
                      "seed": "" if shot.video else f" · seed {shot.seed}", "prompt": shot.prompt, "still": still,
                      "start": f"{start + 0.5 / script.fps:.3f}"})  # fmt: skip
        start += seconds
    return _CARDS.render(cards=cards)


@lru_cache(512)
def _made(film: Path, number: int, modified: int) -> tuple[str, int]:
    """Returns a picture of a shot, decoded once while its video stays as it is, and how many frames the video has."""
    folder = FilmFolder(film)
    return data_url(Stills(folder).middle(number)), folder.num_frames(number)


def _filled(value: Any, label: str) -> Any:
    """Returns what a field for a number holds. Raises UserError where it is empty."""
    if value is None:
        raise UserError(f"{label} is empty; write a number there")
    return value


def _takes(studio: Studio, name: str, number: int) -> tuple[str | None, str | None]:
    """Returns the two newest takes of a shot."""
    takes = [str(path) for path in studio.takes(name, number)]
    return (takes[-2] if len(takes) > 1 else None), (takes[-1] if takes else None)


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Shows on the page what the user can mend."""
    try:
        yield
    except (UserError, FloatingPointError) as error:
        raise gr.Error(str(error)) from None


def _guarded(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the callback, whose errors the page then shows."""

    @wraps(callback)
    def guarded(*arguments: Any) -> Any:
        with _errors_shown():
            return callback(*arguments)

    return guarded


def _guarded_generator(callback: Callable[..., Generator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """Returns what `_guarded` does, of a callback that yields how far it is. The callback runs and is closed in other
    threads: closing waits for a step, which gradio would do in the loop that serves every page."""

    @wraps(callback)
    async def guarded(*arguments: Any) -> AsyncIterator[Any]:
        told, asked = callback(*arguments), None
        try:
            with _errors_shown():
                while True:
                    asked = asyncio.ensure_future(asyncio.to_thread(next, told, None))
                    if (values := await asyncio.shield(asked)) is None:
                        return
                    yield values
        finally:
            if asked:
                await asyncio.wait([asked])  # a generator that runs cannot be closed
            await asyncio.to_thread(told.close)

    return guarded
