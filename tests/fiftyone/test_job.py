"""What a run was asked is kept with the dataset."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_settings_are_kept_and_found_again(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(3)
    ids = dataset.match({"role": "reference"}).values("id")[:2]
    job = SegmentationJob(prompt="the same", reference_ids=ids, router="full_reasoning", proxy=False)
    key = job.keep(dataset)
    assert key.startswith("concept_") and dataset.list_runs(method="segment_concept") == [key]
    assert SegmentationJob.load(dataset, key) == SegmentationJob(
        prompt="the same", reference_ids=ids, router="full_reasoning", proxy=False, outputs=["segmentation"]
    )
    resumed = SegmentationJob(
        prompt="the same", reference_ids=ids, router="full_reasoning", proxy=False, skip_existing=True
    )
    assert resumed.keep(dataset) == key
    assert SegmentationJob(prompt="another").keep(dataset) != key
    with pytest.raises(ValueError, match="run 'nothing' is not kept"):
        SegmentationJob.load(dataset, "nothing")


def test_references_from_outside_cannot_be_repeated(make_dataset):
    from conceptseg_hf import Reference
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(1)
    job = SegmentationJob(prompt="star", references=[Reference(dataset.first().filepath)])
    key = job.keep(dataset)
    with pytest.raises(ValueError, match="references that are no samples of the dataset"):
        SegmentationJob.load(dataset, key)


def test_shared_references_are_samples(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(6)
    ids = dataset.match({"role": "reference"}).exists("ref_boxes").values("id")[:3]
    view = dataset.limit(8)
    assert set(ids) & set(view.values("id"))
    job = SegmentationJob(prompt="the same object", reference_ids=ids, router="full_reasoning")
    assert [reference.role for reference in job.shared_references(dataset)] == ["auto"] * 3
    *_, progress = segment_collection(view, job)
    left_out = set(ids) & set(view.values("id"))
    assert (progress.done, progress.skipped) == (8 - len(left_out), 0)
    assert dataset.select(ids).count("concept") == 0
    assert len(set(dataset.exists("concept").values("concept.run"))) == 1
    for wrong in ("0" * 24, "no id"):
        with pytest.raises(ValueError, match="1 of 2 references are not in the dataset"):
            SegmentationJob(prompt="star", reference_ids=[ids[0], wrong]).check(dataset)


def test_references_can_be_shown_unmarked(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(9)
    targets = dataset.load_saved_view("targets").match({"level": "CR"})
    common = {"prompt_field": "prompt", "reference_ids_field": "reference_ids", "router": "full_reasoning"}
    for job in (
        SegmentationJob(field="marked", **common),
        SegmentationJob(field="unmarked", reference_label_field=None, **common),
    ):
        for _ in segment_collection(targets, job):
            pass
    assert any(value is not None for value in targets.values("marked.check_iou"))
    assert set(targets.values("unmarked.check_iou")) == {None}
