"""Shows a studio as a page for the browser, made with gradio (`pip install -e '.[app]'`)."""

from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import gradio as gr
from jinja2 import Environment

from film.folder import FilmFolder
from film.page import data_url
from film.presentation import Stills
from film.studio import State, Studio
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
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden;
        background: var(--background-fill-secondary); }
.card .still { aspect-ratio: 16 / 9; background: var(--border-color-primary) center / cover; }
.card p { margin: 0; padding: 8px 12px; overflow-wrap: anywhere; }
.card .head { display: flex; justify-content: space-between; font-size: 12px; opacity: .75; padding-bottom: 0; }
"""
_CARDS = Environment(autoescape=True).from_string(
    """<div class="cards">{% for card in cards %}<div class="card">
<div class="still"{% if card.still %} style="background-image: url({{ card.still }})"{% endif %}></div>
<p class="head"><b>{{ card.number }}</b>
<span>{{ "cut" if card.cut else "goes on" }} · {{ card.seconds }} s · seed {{ card.seed }}</span></p>
<p>{{ card.prompt }}</p></div>{% endfor %}</div>"""
)


def build_app(studio: Studio) -> gr.Blocks:
    """Builds the page. It shows what is in the studio's folder, and does what `Studio` does."""
    with gr.Blocks(title="Storyboard", analytics_enabled=False) as app:
        gr.Markdown("# Storyboard\nWrite a story shot by shot, see what it costs, film it, make single shots anew.")
        with gr.Row():
            with gr.Column(scale=2):
                name = gr.Dropdown(studio.names(), value=None, label="Film", allow_custom_value=True, elem_id="name")
                script = gr.Code(EXAMPLE, language="yaml", label="Script", lines=14, max_lines=24, elem_id="script")
                upload = gr.UploadButton("Load a file", file_types=[".yaml", ".yml", ".json"], size="sm")
                with gr.Row():
                    check = gr.Button("Save and estimate", elem_id="check")
                    preview = gr.Button(f"Preview, {studio.preview_steps} steps", elem_id="preview")
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                status = gr.Textbox(label="Status", interactive=False, lines=1, elem_id="status")
                cost = gr.Code("", label="Estimate", interactive=False, language=None, lines=4, elem_id="cost")
            with gr.Column(scale=3):
                film = gr.Video(label="Film", interactive=False, elem_id="film")
                cards = gr.HTML(elem_id="cards")
                with gr.Accordion("Make a shot anew", open=True):
                    with gr.Row():
                        number = gr.Number(1, label="Shot", precision=0, minimum=1, elem_id="number")
                        seed = gr.Number(1, label="Seed", precision=0, minimum=0, elem_id="seed")
                    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
                    redo = gr.Button("Make this shot anew", elem_id="redo")
                    with gr.Row():
                        before = gr.Video(label="The take before", interactive=False, elem_id="before")
                        now = gr.Video(label="This take", interactive=False, elem_id="now")
                files = gr.Files(label="Download", interactive=False, elem_id="files")

        shown, takes = [film, cards, files], [before, now]

        def open_script(name: str) -> tuple[Any, ...]:
            """Shows a film, and its first shot to be made anew: another film's number means another shot. Under a new
            name the script may be kept; nothing is left of the film before."""
            if name not in studio.names():
                return gr.skip(), 1, "", None, "", None, None, None
            first = studio.read(name).shots[0].prompt
            return studio.text(name), 1, first, *_film(studio, name), *_takes(studio, name, 1)

        def save(name: str, text: str) -> tuple[Any, ...]:
            text = studio.save(name, text)
            return gr.update(choices=studio.names(), value=name), text, studio.estimate(name), _cards(studio, name)

        def choose(name: str, number: int | None) -> tuple[Any, ...]:
            chosen = _filled(number, "Shot")
            return studio.shot(name, chosen).prompt, *_takes(studio, name, chosen)

        def film_script(name: str, text: str) -> Iterator[tuple[Any, ...]]:
            studio.save(name, text)
            yield from _follow(studio.make(name), lambda: _film(studio, name))

        def film_preview(name: str, text: str) -> Iterator[tuple[Any, ...]]:
            studio.save(name, text)
            folder = studio.preview_folder(name)
            end = lambda: (str(folder.path / "video.mp4"), gr.skip(), gr.skip())  # noqa: E731
            yield from _follow(studio.preview(name), end, "previewed")

        def film_again(name: str, number: int | None, prompt: str, seed: int | None) -> Iterator[tuple[Any, ...]]:
            chosen = _filled(number, "Shot")
            making = studio.redo(name, chosen, prompt, _filled(seed, "Seed"))
            for told in _follow(making, lambda: _film(studio, name)):
                done = told[0].startswith("filmed")
                yield (*told, *(_takes(studio, name, chosen) if done else (gr.skip(), gr.skip())),
                       studio.text(name) if done else gr.skip())  # fmt: skip

        name.change(_told(open_script), name, [script, number, prompt, *shown, *takes])
        upload.upload(lambda file: Path(file).read_text(encoding="utf-8"), upload, script)
        number.input(_told(choose), [name, number], [prompt, *takes])
        alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # one at a time has the model
        check.click(_told(save), [name, script], [name, script, cost, cards], **alone)
        running: list[Any] = [
            generate.click(_told_along(film_script), [name, script], [status, *shown], **alone),
            preview.click(_told_along(film_preview), [name, script], [status, *shown], **alone),
            redo.click(
                _told_along(film_again), [name, number, prompt, seed], [status, *shown, *takes, script], **alone
            ),
        ]
        stop.click(lambda: "stopped; what is finished is kept, and generating goes on from there", None, status,
                   cancels=running)  # fmt: skip
        app.load(lambda: gr.update(choices=studio.names()), None, name)
    return app


def launch(studio: Studio, port: int, block: bool = True) -> gr.Blocks:
    """Serves the page on this machine alone, out of the studio's folder alone."""
    app = build_app(studio).queue(default_concurrency_limit=1)
    theme = gr.themes.Soft(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    app.launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=not block,
        allowed_paths=[str(studio.folder)], theme=theme, css=_STYLE,
    )  # fmt: skip
    return app


def _follow(
    states: Iterator[State], end: Callable[[], tuple[Any, ...]], done: str = "filmed"
) -> Iterator[tuple[Any, ...]]:
    """Yields what to show of a film in the making: how far it is, and its newest shot; then the whole."""
    count = 0
    for state in states:
        newest = gr.skip()
        if len(state.shots) > count:
            count, newest = len(state.shots), str(state.shots[-1])
        yield f"{state.done:.0%} of the steps, {count} shots finished", newest, gr.skip(), gr.skip()
    yield (done, *end())


def _film(studio: Studio, name: str) -> tuple[Any, Any, Any]:
    """Returns the video, the cards and the files of a film, as far as they are there."""
    folder = studio.film(name)
    files = [str(path) for path in [*folder.files(), folder.path / "metadata.json"] if path.exists()]
    video = folder.path / "video.mp4"
    return (str(video) if folder.is_finished else None), _cards(studio, name), files or None


def _cards(studio: Studio, name: str) -> str:
    script, folder = studio.read(name), studio.film(name)
    cards = []
    for number, shot in enumerate(script.shots, start=1):
        video = folder.shot(number)
        still = _still(folder.path, number, video.stat().st_mtime_ns) if video.exists() else ""
        cards.append({"number": number, "cut": shot.cut, "seconds": f"{shot.seconds:g}", "seed": shot.seed,
                      "prompt": shot.prompt, "still": still})  # fmt: skip
    return _CARDS.render(cards=cards)


@lru_cache(512)
def _still(film: Path, number: int, modified: int) -> str:
    """Returns a picture of a shot, decoded once while its video stays as it is."""
    return data_url(Stills(FilmFolder(film)).middle(number))


def _filled(value: int | None, label: str) -> int:
    """Returns what a field for a number holds. Raises UserError where it is empty."""
    if value is None:
        raise UserError(f"{label} is empty; write a whole number there")
    return value


def _takes(studio: Studio, name: str, number: int) -> tuple[str | None, str | None]:
    """Returns the two newest takes of a shot."""
    takes = [str(path) for path in studio.takes(name, number)]
    return (takes[-2] if len(takes) > 1 else None), (takes[-1] if takes else None)


def _told(act: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the user what the user can mend."""

    @wraps(act)
    def told(*arguments: Any) -> Any:
        try:
            return act(*arguments)
        except (UserError, FloatingPointError) as error:
            raise gr.Error(str(error)) from None

    return told


def _told_along(act: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Does what `_told` does, for a function that yields how far it is."""

    @wraps(act)
    def told(*arguments: Any) -> Iterator[Any]:
        try:
            yield from act(*arguments)
        except (UserError, FloatingPointError) as error:
            raise gr.Error(str(error)) from None

    return told
