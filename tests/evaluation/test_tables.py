"""Tests of formatted tables and of the provenance line."""

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


def test_special_characters_in_cells_are_escaped():
    lines = markdown_table(["a", "b"], [["x|y", "1\n2"], ["", "long cell"]])
    assert lines == [
        "| a    | b         |",
        "|------|-----------|",
        "| x\\|y | 1 2       |",
        "|      | long cell |",
    ]


def test_csv_quotes_strings_and_writes_none_as_empty_cells():
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
def test_checkpoint_name_omits_the_parent_folders(model, name):
    assert checkpoint_name({"model": model}) == name


def test_provenance_line_omits_default_values():
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
