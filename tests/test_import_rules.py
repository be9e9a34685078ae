"""These tests are about who may import whom: `moc` is a library of its own, no package imports one above it, and nobody
imports a script."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "moc": {"models", "data", "film", "evaluation", "configs", "scripts", "train", "sample"},
    "data": {"models", "film", "evaluation", "configs", "scripts", "train", "sample"},
    "models": {"data", "film", "evaluation", "configs", "scripts", "train", "sample"},
    "film": {"evaluation", "configs", "scripts", "train", "sample"},
    "evaluation": {"configs", "scripts", "train", "sample"},
    "configs": {"evaluation", "scripts", "train", "sample"},
    "scripts": {"scripts", "train", "sample"},  # what two scripts share lies in a room
    "tests": {"scripts"},  # a test runs a command, or enters the room that the command hands over to
}


def imported_modules(source: str, package: tuple[str, ...]) -> set[str]:
    """Returns full names that a module of `package` imports, by statement or by a literal name at run time: a module,
    or what is taken from one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found |= {".".join(filter(None, (*base, node.module, alias.name))) for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def imported_packages(source: str, package: tuple[str, ...]) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(source, package)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import models.vae as v, torch", {"models", "torch"}),
        ("def f():\n    from data.media.decode import open_video", {"data"}),
        ("from . import layout", {"moc"}),
        ("from ..diffusion import flow", {"moc"}),
        ("from ... import data", {"data"}),
        ("import importlib\nimportlib.import_module('models.wan')", {"importlib", "models"}),
    ],
)
def test_the_scanner_sees_every_form_of_import(source, expected):
    assert imported_packages(source, ("moc", "kernels")) == expected


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_to_their_side(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = []
    for path in files:
        names = imported_packages(path.read_text(), path.relative_to(ROOT).parent.parts)
        broken += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(names & FORBIDDEN[package])]
    assert not broken


def test_no_files_import_each_other_in_a_circle():
    """Imports within functions count too: who reads a file need not have read one that needs it."""
    files = {path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    assert len(names) > 100
    graph = {}
    for name, path in names.items():
        imported = imported_modules(path.read_text(), path.relative_to(ROOT).parent.parts)
        graph[name] = {one if one in names else one.rpartition(".")[0] for one in imported} & names.keys() - {name}
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {"moc.layout": {"moc.attention"}}).prepare()
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_composition_roots_stay_short(name):
    num_lines = len((ROOT / name).read_text().splitlines())
    assert num_lines < 100
