"""The embedded checkpoint for photographs is small, loadable and trained. Its full results are in its model card."""

from __future__ import annotations

import numpy as np
import pytest
from real_photographs import REAL, needs_real_photographs
from transformers import pipeline

from conceptseg_hf import mini_checkpoint
from conceptseg_hf.data import SMOKE_PHOTOS, load_benchmark
from conceptseg_hf.evaluation import EvaluationReport, evaluate


def test_checkpoint_is_small_and_for_non_commercial_use() -> None:
    folder = mini_checkpoint()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card and "Non-commercial use only" in card


def test_pipeline_finds_it_by_name() -> None:
    sample = load_benchmark("plain", root=SMOKE_PHOTOS, split="test")[0]
    result = pipeline("concept-segmentation", model="conceptseg-mini")(sample.image, prompt=sample.prompt)
    assert result["error"] is None and result["mask"].size == sample.image.size


@pytest.mark.slow
@needs_real_photographs
def test_segments_held_out_photographs() -> None:
    reports = {
        router: evaluate("mini", "photos", root=REAL, router=router, limit=84, batch_size=12)
        for router in ("adaptive", "sam_only")
    }
    assert _mean(reports["adaptive"]) >= 0.29
    assert _mean(reports["adaptive"]) >= _mean(reports["sam_only"]) + 0.18
    records = [record for record in reports["adaptive"].records if record["route"] == "reasoning"]
    assert np.mean([record["format_valid"] for record in records]) >= 0.95


def _mean(report: EvaluationReport) -> float:
    return float(np.mean([record["foreground_iou"] for record in report.records if record["present"]]))
