"""Tests of `segment_other_route` and of comparing routes in `find_uncertain`."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.slow

OTHER_FIELD = "concept_other_route"


def masks(samples, field):
    return {sample.id: sample[field].get_mask() for sample in samples.exists(field)}


@pytest.fixture()
def segmented(make_dataset):
    """Return a dataset with predictions by both routes, and the jobs with own and with shared references."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(15)
    targets = dataset.load_saved_view("targets")
    own = SegmentationJob(prompt_field="prompt", reference_ids_field="reference_ids")
    ids = dataset.match({"role": "reference"}).exists("ref_boxes").values("id")[:3]
    shared = SegmentationJob(prompt="the same object", reference_ids=ids, router="full_reasoning")
    for samples, job in ((targets[:12], own), (targets[12:], shared)):
        for _ in segment_collection(samples, job):
            pass
    return dataset, own, shared


def test_the_other_route_uses_the_same_prompt_and_references(segmented):
    from dataclasses import replace

    from conceptseg_hf.integrations.fiftyone import segment_collection, segment_other_route

    dataset, own, shared = segmented
    targets = dataset.load_saved_view("targets")
    *_, progress = segment_other_route(targets)
    assert (progress.total, progress.done, progress.errors) == (15, 15, {})
    routes = list(zip(targets.values("concept.route"), targets.values(f"{OTHER_FIELD}.route")))
    assert set(routes) == {("shortcut", "reasoning"), ("reasoning", "shortcut")}
    expected = {}
    for samples, job in ((targets[:12], own), (targets[12:], shared)):
        for router in ("sam_only", "full_reasoning"):
            for _ in segment_collection(samples, replace(job, field=router, router=router)):
                pass
    for sample in targets:
        router = "full_reasoning" if sample["concept"]["route"] == "shortcut" else "sam_only"
        expected[sample.id] = sample[router].get_mask()
    results = masks(targets, OTHER_FIELD)
    assert results.keys() == expected.keys()
    assert all(np.array_equal(results[key], expected[key]) for key in results)

    # Existing results are skipped; replacing a prediction clears its result.
    *_, progress = segment_other_route(targets)
    assert (progress.total, progress.skipped) == (0, 15)
    for _ in segment_collection(targets[:2], own):
        pass
    assert targets.count(OTHER_FIELD) == 13
    *_, progress = segment_other_route(targets)
    assert (progress.done, progress.skipped) == (2, 13)


def test_the_operator_compares_routes(segmented, run_operator):
    from conceptseg_hf.evaluation import foreground_iou

    dataset, *_ = segmented
    params = {"other_route": True, "margin": 0, "check_iou": 0, "routes_iou": 0.5}
    result = run_operator("find_uncertain", dataset, params).result
    targets = dataset.load_saved_view("targets")
    first, second = masks(targets, "concept"), masks(targets, OTHER_FIELD)
    disagree = {key for key in first if foreground_iou(first[key] > 0, second[key] > 0) < 0.5}
    assert 0 < len(disagree) < 15
    assert result == {"total": len(disagree), "presence": 0, "check": 0, "routes": len(disagree), "error": 0}
    assert set(dataset.match_tags("uncertain: routes disagree").values("id")) == disagree


def test_predictions_without_a_stored_run_raise(make_dataset):
    from conceptseg_hf.integrations.fiftyone import (
        ConceptSegFiftyOneModel,
        declare_prediction_fields,
        find_uncertain,
        segment_other_route,
    )

    dataset = make_dataset(2)
    with pytest.raises(ValueError, match="field 'concept' holds no predictions of segment_concept"):
        next(segment_other_route(dataset))
    for output, field in (("segmentation", "applied"), ("detections", "boxes")):
        declare_prediction_fields(dataset, field, [output])
        dataset.apply_model(ConceptSegFiftyOneModel(prompt="star", output=output, router="sam_only"), field)
    with pytest.raises(ValueError, match="there is no run to repeat"):
        next(segment_other_route(dataset, "applied"))
    with pytest.raises(ValueError, match="'boxes' holds no Segmentation"):
        find_uncertain(dataset, "applied", other_field="boxes")
