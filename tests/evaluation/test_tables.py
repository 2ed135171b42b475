"""Tables as text, and the line that says how numbers were made."""

from __future__ import annotations

import csv
import io

import pytest

from conceptseg_hf.evaluation.reporting.bootstrap import Interval
from conceptseg_hf.evaluation.reporting.tables import (
    checkpoint_name,
    csv_text,
    interval_text,
    markdown_table,
    provenance,
    provenance_line,
)


def test_cells_cannot_break_a_table():
    lines = markdown_table(["a", "b"], [["x|y", "1\n2"], ["", "long cell"]])
    assert lines == [
        "| a    | b         |",
        "|------|-----------|",
        "| x\\|y | 1 2       |",
        "|      | long cell |",
    ]


def test_csv_quotes_and_leaves_none_empty():
    text = csv_text([{"a": 'say "x", y', "b": None}, {"a": "é", "b": 1.5}])
    assert list(csv.DictReader(io.StringIO(text))) == [{"a": 'say "x", y', "b": ""}, {"a": "é", "b": "1.5"}]
    assert csv_text([]) == "\n"


def test_intervals():
    interval = Interval(0.5, -0.25, 1.0, 3)
    assert interval_text(interval, 2, signed=True) == "+0.50 [-0.25, +1.00]"
    assert interval_text(None) == "-"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/home/someone/checkpoints/small", "small"),
        ("checkpoints/stage/small", "small"),
        ("owner/small", "owner/small"),
        ("", "in memory"),
        (None, "in memory"),
    ],
)
def test_a_checkpoint_is_named_without_its_place(model, name):
    assert checkpoint_name({"model": model}) == name


def test_the_line_leaves_out_what_is_as_usual():
    settings = {
        "benchmark": "DUTS",
        "split": "test",
        "seed": 0,
        "protocol": "paper",
        "router": "adaptive",
        "sam_prompt": "concept+text",
        "max_references": None,
        "generation": None,
        "model": "m",
        "weights": "abc",
    }
    assert provenance_line(settings, 7) == (
        "benchmark DUTS, split test, seed 0, protocol paper, router adaptive, checkpoint m (weights abc), n 7."
    )
    changed = provenance_line(settings | {"sam_prompt": "box", "max_references": 1}, 7)
    assert "sam prompt box, max references 1" in changed
    assert provenance(settings, 7)["samples"] == 7
