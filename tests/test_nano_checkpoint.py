"""The embedded checkpoint: small, loadable, and really trained. Its full figures are in its model card."""

from __future__ import annotations

import pytest

from conceptseg_hf import nano_checkpoint
from conceptseg_hf.evaluation import EvaluationReport, evaluate


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return evaluate(None, "concept-shapes", split="val", limit=60, batch_size=20, router="full_reasoning")


@pytest.fixture(scope="module")
def alone() -> EvaluationReport:
    return evaluate(None, "concept-shapes", split="val", limit=60, batch_size=20, router="sam_only")


def _value(report: EvaluationReport, level: str, name: str) -> float:
    return next(row[name] for row in report.table if row["level"] == level and row["group"] == "all")


def test_it_is_small_and_holds_no_pickle() -> None:
    files = {path.name: path.stat().st_size for path in nano_checkpoint().rglob("*") if path.is_file()}
    assert sum(size for name, size in files.items() if name.endswith(".safetensors")) <= 16e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert "README.md" in files


def test_it_writes_in_the_template(report: EvaluationReport) -> None:
    assert _value(report, "all", "format_rate") >= 0.95


def test_it_finds_what_blends_in_or_stands_out(report: EvaluationReport) -> None:
    assert _value(report, "CD", "box_iou") >= 0.4
    assert _value(report, "CD", "foreground_iou") >= 0.4


def test_it_finds_what_a_phrase_names(report: EvaluationReport) -> None:
    assert _value(report, "CI", "box_iou") >= 0.3
    assert _value(report, "CI", "foreground_iou") >= 0.5


def test_sam_alone_knows_words_and_what_is_absent(alone: EvaluationReport) -> None:
    assert _value(alone, "CI", "foreground_iou") >= 0.65
    assert _value(alone, "CI", "presence_auc") >= 0.9


def test_reasoning_adds_to_sam_alone(report: EvaluationReport, alone: EvaluationReport) -> None:
    assert _value(report, "CD", "foreground_iou") >= _value(alone, "CD", "foreground_iou") + 0.1
