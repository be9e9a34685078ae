"""These tests are about records of rows: what a row replaces, and what it keeps of where it was measured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.benchmarks import commands, film_report, memory, parallel, recall_report, sampling_report, step, stories
from evaluation.benchmarks.attention_report import write_tables
from evaluation.benchmarks.measurements import measured_on, put_row, read_rows
from tests.pipeline import ROOT

KEY = ("gpu", "impl")
ONE = {"gpu": "a GPU", "torch": "2", "date": "today", "commit": "a"}


def test_only_a_row_of_the_same_key_is_replaced(tmp_path):
    output = tmp_path / "made" / "r.json"
    assert read_rows(output) == []
    put_row(output, {"impl": "moc", "ms": 3}, KEY, ONE)
    put_row(output, {"impl": "dense", "ms": 9}, KEY, ONE)
    put_row(output, {"impl": "moc", "ms": 2}, KEY, ONE | {"commit": "b"})
    rows = put_row(output, {"impl": "moc", "ms": 1}, KEY, ONE | {"gpu": "another GPU"})
    assert [(row["gpu"], row["impl"], row["commit"], row["ms"]) for row in rows] == [
        ("a GPU", "dense", "a", 9), ("a GPU", "moc", "b", 2), ("another GPU", "moc", "a", 1),
    ]  # fmt: skip
    assert read_rows(output) == rows
    assert measured_on(rows) == (
        "a GPU; torch 2; today; commit a. a GPU; torch 2; today; commit b. another GPU; torch 2; today; commit a."
    )


def test_the_header_holds_what_rows_share_and_a_row_what_is_its_own(tmp_path):
    output = tmp_path / "r.json"
    put_row(output, {"impl": "moc", "grid": (1, 2)}, KEY, ONE)
    put_row(output, {"impl": "dense", "torch": "3"}, KEY, ONE)
    record = json.loads(output.read_text())
    assert record["header"] == {name: ONE[name] for name in ("gpu", "date", "commit")}
    assert record["rows"] == [{"torch": "2", "impl": "moc", "grid": [1, 2]}, {"torch": "3", "impl": "dense"}]


def test_rows_of_a_record_whose_header_says_less_stay_as_they_are(tmp_path):
    output = tmp_path / "r.json"
    output.write_text(json.dumps({"header": {"gpu": "a GPU", "commit": "old"}, "rows": [{"impl": "moc"}]}))
    old, new = put_row(output, {"impl": "dense"}, KEY, ONE)
    assert old == {"gpu": "a GPU", "commit": "old", "impl": "moc"}
    assert json.loads(output.read_text())["header"] == {"gpu": "a GPU"}
    assert new["commit"] == "a"


PAGES: dict[str, Callable[[list[dict]], str]] = {
    "film": film_report.tables,
    "gpu_commands": lambda rows: commands.page(rows, Path("outputs")),
    "memory": memory.page,
    "parallel": parallel.page,
    "sampling": sampling_report.page,
    "step": step.page,
}
WRITTEN = {
    "attention": write_tables,
    "attention_h200": write_tables,
    "attention_short": write_tables,
    "recall": recall_report.write_report,
    "stories": stories.write_tables,
}


@pytest.mark.parametrize("name", [*PAGES, *WRITTEN])
def test_a_page_in_docs_is_that_of_its_record(name, tmp_path):
    record, file = ROOT / f"docs/benchmarks/{name}.json", tmp_path / "made.md"
    rows = read_rows(record)
    if name in PAGES:
        file.write_text(PAGES[name](rows))
    else:
        WRITTEN[name](rows, file)
    assert file.read_text() == record.with_suffix(".md").read_text()


def test_passes_of_a_case_belong_together_whatever_the_order_of_their_fields(tmp_path):
    """A row that was just measured has the header's fields in another order than one that was read."""
    rows = read_rows(ROOT / "docs/benchmarks/attention_short.json")
    rows[-1] = dict(reversed(rows[-1].items()))
    assert write_tables(rows, tmp_path / "made.md") == (ROOT / "docs/benchmarks/attention_short.md").read_text()
