"""The way through the code: what one training step and one shot of a film enter is what its page says to read."""

import ast
import inspect
import re
import sys
import threading
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from unittest import mock

from film.shooting import Shooting
from moc.training import Trainer
from tests.pipeline import ROOT, command


class Way:
    """A way is the functions that run from the first call of `first` to the first return of `last`, in the order
    entered.

    first: a class and the name of its method. last: the qualified name of a function.
    """

    def __init__(self, first: tuple[type, str], last: str) -> None:
        self.first, self.last = first, last
        self.entered: dict[tuple[str, int], None] = {}  # file and first line of each function, in order
        self.begun = self.ended = False

    def __call__(self, frame, event, _) -> None:
        code = frame.f_code
        if event == "call" and not self.ended:
            self.begun |= code.co_qualname == getattr(*self.first).__qualname__
            if self.begun and code.co_flags & inspect.CO_OPTIMIZED:  # a function, not the body of a module or class
                self.entered.setdefault((code.co_filename, code.co_firstlineno))
        elif event == "return" and self.begun:
            self.ended |= code.co_qualname == self.last
            if self.ended:
                sys.setprofile(None)  # the profiler would slow down the other tests

    @contextmanager
    def watched(self):
        """Watches the thread that calls `first`, and those that start meanwhile."""
        before, first = sys.getprofile(), getattr(*self.first)

        @wraps(first)
        def watched(*arguments, **settings):
            threading.setprofile(self)
            sys.setprofile(self)
            try:
                return first(*arguments, **settings)
            finally:
                sys.setprofile(before)
                threading.setprofile(None)

        with mock.patch.object(*self.first, watched):
            yield self
        assert self.ended, f"{self.last} did not return"

    @property
    def files(self) -> list[Path]:
        """Returns the project's own files, but for tests."""
        files = dict.fromkeys(Path(file) for file, _ in self.entered)
        packages = {"configs", "data", "evaluation", "film", "moc", "models", "scripts", "train.py", "sample.py"}
        return [file for file in files if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in packages]

    def num_lines(self) -> int:
        """Lines of the functions entered, each whole: from `def` or its decorators to its end, docstrings included."""
        lines = set()
        for file in self.files:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef):
                    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                    if (str(file), start) in self.entered:
                        lines |= {(file, number) for number in range(start, node.end_lineno + 1)}
        return len(lines)


def assert_page_tells(beginning: str, way: Way) -> None:
    """Checks that the page's paragraph that begins so lists these files, in this order, and a limit that the lines
    keep."""
    paragraph = (ROOT / "docs/read_the_code.md").read_text().split(beginning)[1].split("\n\n")[0]
    files = [str(file.relative_to(ROOT)) for file in way.files]
    assert re.findall(r"`(\S+\.py)`", paragraph) == files, f"docs/read_the_code.md should list {files}"
    num_files, limit = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:files|lines)", paragraph))
    assert num_files == len(files)
    assert way.num_lines() <= limit <= 2000, way.num_lines()


def test_one_training_step_enters_what_its_page_lists(prepared, tmp_path):
    with Way((Trainer, "run"), "Flow.loss").watched() as way:
        debug = ["model=debug", "parallel=cpu", "trainer.num_steps=1", "data.workers=0", "data.validation=0"]
        command("train.py", f"data.path={prepared}", f"output={tmp_path}", "name=run", *debug)
    assert_page_tells("One training step", way)


def test_one_shot_of_a_film_enters_what_its_page_lists(trained, tmp_path):
    script = tmp_path / "script.yaml"
    script.write_text("{title: t, global: a, size: [32, 48], fps: 8, negative: b, shots: [{prompt: c, seconds: 1}]}")
    with Way((Shooting, "run"), "Shooting.run").watched() as way:
        paths = (f"checkpoint={trained}", f"script={script}", f"out={tmp_path / 'film'}")
        command("sample.py", *paths, "device=cpu", "sampler.steps=2")
    assert_page_tells("One shot of a film", way)
