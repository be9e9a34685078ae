"""These tests are about README.md and the pages of docs/: their commands are ones that the code takes, and their links
lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from configs.command import parse
from configs.overrides import readable
from configs.words import words
from tests.composing import COMMANDS, CONFIGS, ROOT, composed, schema_of

PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md"),
    *sorted((ROOT / "docs/checkpoints").glob("*/README.md")),
]
NAMES = {f"{module.replace('.', '/')}.py": name for name, (module, _) in COMMANDS.items()}


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """Returns (script, settings) of every command of our own in the page's code, blocks (fenced or indented) and lines;
    "..." stands for others."""
    text = page.read_text()
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in lines(block)]
    blocks += re.findall(r"^    (python .*)$", text.replace("\\\n", " "), re.MULTILINE)
    inline = [
        " ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    found = []
    for line in [*blocks, *inline]:
        said = [word for word in shlex.split(line, comments=True) if word != "..."]
        script = next((word for word in said if word.endswith(".py")), None)
        if script:
            found.append((script, [word for word in said[said.index(script) + 1 :] if not word.startswith("-")]))
    return found


def lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


EVERY = sorted({(script, *settings) for page in PAGES for script, settings in commands_of(page)})


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_every_command_of_a_page_is_one_that_the_code_takes(command):
    script, *settings = command
    # A sweep gives several values for a setting; the first one is composed.
    settings = [re.sub(r"^(\w[\w.]*=[^,\[{'\"]+),.*", r"\1", setting) for setting in settings]
    schema = schema_of(NAMES[script])
    cfg = composed(NAMES[script], *[readable(setting, CONFIGS) for setting in settings])
    assert isinstance(parse(cfg, schema), schema)


def test_the_readme_has_commands():
    scripts = {script for script, _ in commands_of(ROOT / "README.md")}
    assert {"train.py", "sample.py", "scripts/prepare_data.py", "scripts/evaluate.py", "scripts/app.py"} <= scripts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_exists(page):
    known = {key for name in COMMANDS for key in words(schema_of(name))}
    named = re.findall(r"(?<![\w./-])((?:[a-z]\w*\.)+[a-z]\w*)=", page.read_text())
    assert [key for key in named if key not in known] == []


def anchors(page: Path) -> set[str]:
    """Returns the names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link
