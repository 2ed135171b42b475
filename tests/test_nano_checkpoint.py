"""The embedded checkpoint is small, loadable and trained. Its full results are in its model card."""

from __future__ import annotations

import pytest

from conceptseg_hf import nano_checkpoint
from conceptseg_hf.evaluation import EvaluationReport, evaluate


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return evaluate(None, "concept-shapes", split="val", limit=60, batch_size=20, router="full_reasoning")


@pytest.fixture(scope="module")
def sam_only_report() -> EvaluationReport:
    return evaluate(None, "concept-shapes", split="val", limit=60, batch_size=20, router="sam_only")


def _value(report: EvaluationReport, level: str, name: str) -> float:
    return next(row[name] for row in report.table if row["level"] == level and row["group"] == "all")


def test_checkpoint_is_small_and_contains_no_pickle() -> None:
    files = {path.name: path.stat().st_size for path in nano_checkpoint().rglob("*") if path.is_file()}
    assert sum(size for name, size in files.items() if name.endswith(".safetensors")) <= 16e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert "README.md" in files


def test_completions_follow_the_format(report: EvaluationReport) -> None:
    assert _value(report, "all", "format_rate") >= 0.95


def test_segments_context_dependent_concepts(report: EvaluationReport) -> None:
    assert _value(report, "CD", "box_iou") >= 0.4
    assert _value(report, "CD", "foreground_iou") >= 0.4


def test_segments_context_independent_concepts(report: EvaluationReport) -> None:
    assert _value(report, "CI", "box_iou") >= 0.3
    assert _value(report, "CI", "foreground_iou") >= 0.5


def test_sam_only_segments_words_and_detects_absence(sam_only_report: EvaluationReport) -> None:
    assert _value(sam_only_report, "CI", "foreground_iou") >= 0.65
    assert _value(sam_only_report, "CI", "presence_auc") >= 0.9


def test_reasoning_improves_over_sam_only(
    report: EvaluationReport, sam_only_report: EvaluationReport
) -> None:
    assert _value(report, "CD", "foreground_iou") >= _value(sam_only_report, "CD", "foreground_iou") + 0.1
