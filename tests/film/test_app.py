"""These tests are about the app: what its page shows and does, and the app in a browser."""

import asyncio
import inspect
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.film.test_studio import STORY
from tests.pipeline import ROOT


def test_the_page_shows_what_the_studio_has(studio, in_step):
    app = pytest.importorskip("film.app", reason="needs gradio")
    studio.save("walk", STORY.replace("Mia walks.", "<b>Mia</b> walks."))
    cards = app._cards(studio, "walk")
    assert "&lt;b&gt;Mia&lt;/b&gt; walks." in cards
    assert cards.count('class="card"') == 2
    assert "data:image" not in cards
    *along, last = app._follow(studio.make("walk"), lambda _: app._film(studio, "walk"))
    assert "0% of the steps, 0 of 2 shots<" in along[0][0]
    assert any(re.search(r" 1 of 2 shots, about \d+ (s|minutes) left<", told[0]) for told in along)
    assert any(str(told[1]).endswith("shots/01.mp4") for told in along)
    assert "<span>filmed</span>" in last[0]
    assert last[1].endswith("films/walk/video.mp4")
    made = app._cards(studio, "walk")
    assert made.count("data:image/jpeg") == 2
    # A click plays the film from the middle of a shot's first frame; the shot before it, of 0.34 s, has four frames.
    assert re.findall(r'data-start="(\S+)"', made) == ["0.042", f"{4.5 / 12:.3f}"]
    assert app._takes(studio, "walk", 1)[1].endswith("shots/01.mp4")
    with pytest.raises(Exception, match="no name for a film"):
        app._guarded(studio.text)("../x")


def events(app, studio) -> dict:
    """Returns the page's functions by name."""
    return {event.name: event for event in app.build_app(studio).fns.values()}


def test_one_person_at_a_time_has_the_model(studio):
    app = pytest.importorskip("film.app", reason="needs gradio")
    found = events(app, studio)
    for name in ("save", "film_script", "film_preview", "film_again"):
        assert (found[name].concurrency_id, found[name].concurrency_limit) == ("model", 1)
    assert found["open_script"].concurrency_id != "model"


def test_another_film_begins_at_its_first_shot_and_an_empty_field_is_told(studio):
    """The number of a shot is never that of the film before."""
    app = pytest.importorskip("film.app", reason="needs gradio")
    found = events(app, studio)
    studio.save("walk", STORY)
    shown = dict(
        zip((block.elem_id for block in found["open_script"].outputs), found["open_script"].fn("walk"), strict=True)
    )
    assert (shown["number"], shown["prompt"]) == (1, "Mia walks.")
    assert found["open_script"].fn("a new one")[1:] == (1, "", None, "", None, None, None)
    assert found["choose"].fn("walk", 2)[0] == "Mia waves."
    with pytest.raises(Exception, match="Shot is empty"):
        found["choose"].fn("walk", None)
    with pytest.raises(Exception, match="Shot is empty"):
        first_of(found["film_again"].fn("walk", None, "a", 1))
    list(studio.make("walk"))
    with pytest.raises(Exception, match="Seed is empty"):
        first_of(found["film_again"].fn("walk", 1, "a", None))


def first_of(told):
    """Returns the first thing that an asynchronous iterator yields."""

    async def first():
        return await anext(told)

    return asyncio.run(first())


@pytest.mark.parametrize("moment", ["during a step", "between two steps"])
def test_the_page_is_served_while_a_film_stops(studio, moment):
    """To stop takes a step, during which others look at the page. Gradio runs what is no asynchronous generator by an
    iterator of its own."""
    app = pytest.importorskip("film.app", reason="needs gradio")
    utils = pytest.importorskip("gradio.utils")
    is_asked, is_served, stopped = threading.Event(), threading.Event(), []

    def film():
        try:
            yield 0
            is_asked.set()
            time.sleep(0.2)
            yield 1
        finally:
            stopped.append(is_served.wait(20))

    async def stop():
        told = app._guarded_generator(film)()
        told = utils.SyncToAsyncIterator(told, None) if inspect.isgenerator(told) else told
        assert await anext(told) == 0
        if moment == "during a step":
            step = asyncio.ensure_future(anext(told))
            await asyncio.to_thread(is_asked.wait)
            step.cancel()
        asyncio.get_running_loop().call_later(0.5, is_served.set)
        with suppress(asyncio.CancelledError):
            await (step if moment == "during a step" else asyncio.sleep(0))
        await told.aclose()

    asyncio.run(stop())
    assert stopped == [True]


def test_a_script_in_another_encoding_is_told(studio, tmp_path):
    app = pytest.importorskip("film.app", reason="needs gradio")
    (load,) = [event for event in app.build_app(studio).fns.values() if event.targets[0][1] == "upload"][:1]
    (tmp_path / "story.yaml").write_bytes("title: Märchen".encode("latin-1"))
    with pytest.raises(Exception, match="is not UTF-8; save it as UTF-8"):
        load.fn(str(tmp_path / "story.yaml"))


def test_pictures_on_cards_are_decoded_once(studio, monkeypatch):
    app = pytest.importorskip("film.app", reason="needs gradio")
    studio.save("walk", STORY)
    list(studio.make("walk"))
    cards = app._cards(studio, "walk")
    monkeypatch.setattr(app, "Stills", None)
    assert app._cards(studio, "walk") == cards


# In a browser


@contextmanager
def served(trained: Path, folder: Path):
    """Yields the app as its command serves it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["device=cpu", "sampler.steps=2", "preview_steps=1", f"port={port}", f"folder={folder}"]
    command = [sys.executable, "scripts/app.py", f"checkpoint={trained}", *settings]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            with socket.socket() as seen:
                if seen.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1360,1240"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_a_story_is_filmed_in_a_browser(trained, tmp_path, browser):
    """Loads a script, films it, sees the video play, makes a shot anew and sees both takes; nothing is left elsewhere,
    and no other file is served."""
    pytest.importorskip("gradio")
    folder = tmp_path / "studio"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts/walk.yaml").write_text(STORY)
    (tmp_path / "secret.txt").write_text("secret")

    def until(condition: str, *arguments):
        for _ in range(600):
            found = browser.execute_script(f"return {condition}", *arguments)
            if found:
                return found
            time.sleep(0.2)
        shot = os.environ.get("MOC_SCREENSHOT", str(tmp_path / "failed.png"))
        browser.save_screenshot(shot)
        raise AssertionError(f"never true: {condition}; see {shot}")

    def plays(name: str) -> bool:
        """Has a video played; returns whether its time goes on."""
        video = f"document.querySelector('#{name} video')"
        until(f"{video} && {video}.readyState >= 2 && {video}.duration > 0.3")
        browser.execute_script(f"{video}.muted = true; {video}.play()")
        return bool(until(f"{video}.currentTime > 0.05"))

    with served(trained, folder) as port:
        browser.get(f"http://127.0.0.1:{port}")
        until("document.querySelector('#name input')")
        until("!document.querySelector('#name .translucent')")  # Gradio covers fields that still load
        name = browser.find_element("css selector", "#name input")
        name.click()
        until("[...document.querySelectorAll('[role=option]')].some(option => option.textContent.includes('walk'))")
        browser.find_element("css selector", "[role=option][aria-label=walk]").click()
        until("document.querySelector('#script').textContent.includes('Mia walks.')")
        until("document.querySelectorAll('#cards .card').length === 2")
        browser.find_element("css selector", "#generate").click()
        until("document.querySelector('#status').textContent.trim() === 'filmed'")
        assert plays("film")
        until("document.querySelectorAll('#cards .still[style]').length === 2")
        until("document.querySelector('#files').textContent.replace(/\\s/g, '').includes('index.html')")
        browser.find_element("css selector", "#cards .card[data-number='2']").click()
        until("document.querySelector('#prompt textarea').value === 'Mia waves.'")
        until("document.querySelector('#film video').currentTime >= 0.34")
        browser.find_element("css selector", "#cards .card[data-number='1']").click()
        until("document.querySelector('#prompt textarea').value === 'Mia walks.'")
        browser.find_element("css selector", "#redo").click()
        assert plays("before")
        assert plays("now")
        browser.find_element("css selector", "#back").click()
        until("document.querySelector('#seed input').value === '0'")
        if "MOC_SCREENSHOT" in os.environ:
            browser.save_screenshot(os.environ["MOC_SCREENSHOT"])
        for outside in (tmp_path / "secret.txt", ROOT / "README.md"):
            with pytest.raises(HTTPError, match="403"):
                urlopen(f"http://127.0.0.1:{port}/gradio_api/file={outside}")
    assert (folder / "films/walk/takes/01_1.mp4").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"studio", "secret.txt"}
