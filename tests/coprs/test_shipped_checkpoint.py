"""Regression tests of what coprs-nano has learned, on samples of the split "val".

The values are well below those of the model card, which are measured on more samples of the split "test".
"""

from __future__ import annotations

import numpy as np
import pytest
from transformers import pipeline

from conceptseg_hf import CoPRSForSegmentation, coprs_nano_checkpoint
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE

MAX_BYTES = 8_000_000


def test_checkpoint_is_small_and_segments_in_the_pipeline() -> None:
    folder = coprs_nano_checkpoint()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    assert "license: apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")
    sample = ConceptShapes("val", size=SIDE)[0]
    result = pipeline("concept-segmentation", model="coprs-nano")(
        sample.image, prompt=sample.prompt, references=sample.references
    )
    assert result["error"] is None and result["route"] == "reasoning"
    target, mask = np.asarray(sample.mask) > 0, np.asarray(result["mask"]) > 0
    assert (mask & target).sum() > 0.5 * (mask | target).sum()
    heatmap = np.asarray(result["heatmap"])
    assert heatmap[target].mean() > 0.5 > heatmap[~target].mean()


@pytest.mark.slow
def test_masks_and_priors_of_held_out_samples() -> None:
    model = CoPRSForSegmentation.from_pretrained(coprs_nano_checkpoint())
    split = ConceptShapes("val", size=SIDE)
    report = evaluate(model, [split[i] for i in range(60)], processor=model.processor, batch_size=30)
    for level, floor in {"CI": 0.8, "CD": 0.8, "CR": 0.65}.items():
        records = [record for record in report.records if record["level"] == level and record["present"]]
        assert np.mean([record["foreground_iou"] for record in records]) >= floor, level
        assert np.mean([record["prior"]["auroc"] for record in records]) >= 0.9, level
    present = [record for record in report.records if record["present"]]
    prior_and_mask = [(record["prior"]["iou"], record["foreground_iou"]) for record in present]
    assert np.corrcoef(np.array(prior_and_mask).T)[0, 1] >= 0.5
    assert all(record["format_valid"] for record in report.records)
