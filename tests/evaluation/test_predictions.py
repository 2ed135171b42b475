"""`evaluate_masks`: records of any method in the form of `evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.evaluation import compare, evaluate, evaluate_masks
from conceptseg_hf.images import load_mask


def truth(sample):
    return load_mask(sample.mask)


def upper_half(sample):
    mask = np.zeros(sample.image.size[::-1], dtype=bool)
    mask[: len(mask) // 2] = True
    return mask


def test_a_mask_is_scored_as_by_hand():
    samples = [sample for sample in ConceptShapes("test", length=12) if sample.present][:4]
    report = evaluate_masks(upper_half, samples, "upper half")
    for sample, record in zip(samples, report.records, strict=True):
        target, mask = truth(sample), upper_half(sample)
        assert record["foreground_iou"] == (target & mask).sum() / (target | mask).sum()
        assert record["error"] is None and record["route"] is None
    assert "checkpoint upper half" in report.to_markdown()
    perfect = evaluate_masks(lambda sample: sample.mask, samples, "ground truth")
    assert [record["foreground_iou"] for record in perfect.records] == [1.0] * 4


def test_failures_count_as_empty_masks():
    samples = list(ConceptShapes("test", length=3))

    def predict(sample):
        if sample.sample_id == samples[0].sample_id:
            raise ValueError("no contrast in the image.")
        return truth(sample)[:-1] if sample.sample_id == samples[1].sample_id else truth(sample)

    report = evaluate_masks(predict, samples, "method")
    assert [record["error"] and record["error"][:12] for record in report.records] == [
        "no contrast ",
        "the mask of ",
        None,
    ]
    assert report.records[0]["foreground_iou"] == float(not samples[0].present)


def test_output_can_be_resumed_and_compared_with_a_model(tmp_path, model, processor):
    samples, calls = ConceptShapes("test", length=6), []

    def predict(sample):
        calls.append(sample.sample_id)
        return truth(sample)

    options = {"settings": {"polarity": "dark"}, "output_dir": tmp_path / "method"}
    evaluate_masks(predict, samples, "method", **options, indices=[0, 2])
    report = evaluate_masks(predict, samples, "method", **options)
    assert len(calls) == len(set(calls)) == len(report.records) == 6
    with pytest.raises(ValueError, match="another run"):
        evaluate_masks(
            predict, samples, "method", settings={"polarity": "bright"}, output_dir=tmp_path / "method"
        )
    assert json.loads((tmp_path / "method" / "settings.json").read_text())["polarity"] == "dark"

    evaluate(model, samples, processor=processor, router="sam_only", output_dir=tmp_path / "model")
    comparison = compare(tmp_path / "model", tmp_path / "method")
    assert len(comparison.pairs) == 6 and comparison.unpaired == (0, 0)
    assert comparison.table[-1].second == 1.0


def test_refusals():
    with pytest.raises(ValueError, match="there are no samples"):
        evaluate_masks(truth, ConceptShapes("test", length=3), "method", indices=[])
    with pytest.raises(ValueError, match="no protocol is named 'strict'"):
        evaluate_masks(truth, [replace(ConceptShapes("test", length=1)[0])], "method", protocol="strict")
