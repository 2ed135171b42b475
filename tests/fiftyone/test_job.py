"""Tests of `SegmentationJob`: stored settings, references and output fields."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_settings_are_stored_and_loaded(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(3)
    ids = dataset.match({"role": "reference"}).values("id")[:2]
    job = SegmentationJob(prompt="the same", reference_ids=ids, router="full_reasoning", proxy=False)
    key = job.keep(dataset)
    assert key.startswith("concept_") and dataset.list_runs(method="segment_concept") == [key]
    loaded = SegmentationJob.load(dataset, key)
    assert (loaded.prompt, loaded.reference_ids, loaded.router) == ("the same", ids, "full_reasoning")
    assert not loaded.proxy and loaded.keep(dataset) == key
    resumed = SegmentationJob(
        prompt="the same", reference_ids=ids, router="full_reasoning", proxy=False, skip_existing=True
    )
    assert resumed.keep(dataset) == key
    assert SegmentationJob(prompt="another").keep(dataset) != key
    with pytest.raises(ValueError, match="run 'nothing' is not stored"):
        SegmentationJob.load(dataset, "nothing")


def test_a_run_with_references_outside_the_dataset_cannot_be_loaded(make_dataset):
    from conceptseg_hf import Reference
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(1)
    job = SegmentationJob(prompt="star", references=[Reference(dataset.first().filepath)])
    key = job.keep(dataset)
    with pytest.raises(ValueError, match="references were not samples of the dataset"):
        SegmentationJob.load(dataset, key)


def test_shared_reference_samples_are_not_segmented(make_dataset):
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
    for invalid in ("0" * 24, "no id"):
        with pytest.raises(ValueError, match="1 of 2 references are not in the dataset"):
            SegmentationJob(prompt="star", reference_ids=[ids[0], invalid]).check(dataset)


def test_references_without_marks_have_no_check(make_dataset):
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


def test_fields_with_other_labels_are_rejected(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(2)
    for field, message in (
        ("ground_truth", "holds labels that ConceptSeg did not create there"),
        ("ref_boxes", "already exists and holds no Segmentation"),
        ("prompt", "already exists and holds no Segmentation"),
    ):
        with pytest.raises(ValueError, match=f"field '{field}' {message}"):
            SegmentationJob(prompt="star", field=field).check(dataset)
    with pytest.raises(
        ValueError, match="field 'ref_boxes' holds labels that ConceptSeg did not create there"
    ):
        SegmentationJob(prompt="star", field="ref_boxes", outputs=("detections",)).check(dataset)
    with pytest.raises(ValueError, match="reference field 'nothing' is not in the dataset"):
        SegmentationJob(prompt="star", reference_label_field="nothing").check(dataset)


def test_a_damaged_reference_leaves_predictions_unchanged(make_dataset):
    from pathlib import Path

    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(6)
    targets = dataset.load_saved_view("targets").limit(3)
    for _ in segment_collection(targets, SegmentationJob(prompt="star", router="sam_only")):
        pass
    before = targets.values("concept.id")
    reference = dataset.match({"role": "reference"}).first()
    content = Path(reference.filepath).read_bytes()
    Path(reference.filepath).write_bytes(content[:100])
    try:
        job = SegmentationJob(prompt="star", reference_ids=[reference.id], reference_label_field=None)
        with pytest.raises(ValueError, match="cannot be read"):
            list(segment_collection(targets, job))
    finally:
        Path(reference.filepath).write_bytes(content)
    assert targets.values("concept.id") == before


def test_missing_outputs_of_a_new_run_are_cleared(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(4)
    targets = dataset.load_saved_view("targets")
    outputs = ("segmentation", "detections", "heatmap")
    for samples, kinds in ((targets, outputs), (targets.limit(3), ("segmentation",))):
        for _ in segment_collection(
            samples, SegmentationJob(prompt="star", router="sam_only", outputs=kinds)
        ):
            pass
    assert (targets.count("concept"), targets.count("concept_heatmap")) == (4, 1)
    assert len(targets.exists("concept_detections")) == 1


def test_a_run_writes_only_to_fields_of_its_earlier_runs(fo, make_dataset):
    """Neither the name nor the type of a field is sufficient, and hiding it in a view has no effect."""
    import numpy as np

    from conceptseg_hf.integrations.fiftyone import (
        SegmentationJob,
        declare_prediction_fields,
        segment_collection,
    )

    dataset = make_dataset(3)
    targets = dataset.load_saved_view("targets")

    def run(field, samples=targets, **settings):
        return list(
            segment_collection(samples, SegmentationJob(field, prompt="star", router="sam_only", **settings))
        )

    for sample in targets:
        sample["defect_heatmap"] = fo.Heatmap(map=np.full((8, 8), 0.5))
        sample.save()
    run("defect")
    assert targets.count("defect_heatmap") == 3
    with pytest.raises(ValueError, match="field 'defect_heatmap' holds labels"):
        run("defect", outputs=("segmentation", "heatmap"))
    run("defect_detections", outputs=("detections",))
    run("defect")
    assert len(targets.exists("defect_detections")) == 3

    ground_truths = targets.values("ground_truth.id")
    dataset.clone_sample_field("defect", "corrected")
    declare_prediction_fields(dataset, "ground_truth")
    for field in ("corrected", "ground_truth"):
        for samples in (targets, targets.select_fields("prompt")):
            with pytest.raises(
                ValueError, match=f"field '{field}' holds labels that ConceptSeg did not create there"
            ):
                run(field, samples)
    assert targets.values("ground_truth.id") == ground_truths

    label_ids = targets.values("defect.id")
    hidden = targets.exclude_fields("defect")
    assert run("defect", hidden, skip_existing=True)[-1].skipped == 3
    assert targets.values("defect.id") == label_ids


def test_labels_in_other_group_slices_are_checked(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    path = make_dataset(1).first().filepath
    dataset = fo.Dataset("slices")
    try:
        dataset.add_group_field("group", default="left")
        group = fo.Group()
        left = fo.Sample(filepath=path, group=group.element("left"))
        right = fo.Sample(
            filepath=path, group=group.element("right"), ground_truth=fo.Segmentation(mask_path=path)
        )
        dataset.add_samples([left, right])
        with pytest.raises(ValueError, match="field 'ground_truth' holds labels"):
            SegmentationJob("ground_truth", prompt="star").check(dataset.select_group_slices("left"))
    finally:
        fo.delete_dataset("slices")


def test_only_filtered_labels_of_references_are_used(fo, make_dataset, run_operator):
    from fiftyone import ViewField as F

    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(2)
    references = dataset.load_saved_view("references").limit(2)
    for sample in references:
        boxes = [fo.Detection(label=label, bounding_box=[0.1, 0.1, 0.3, 0.3]) for label in ("dog", "cat")]
        sample["animals"] = fo.Detections(detections=boxes)
        sample.save()
    view = references.filter_labels("animals", F("label") == "dog")
    dataset.save_view("dogs", view)
    parameters = {"prompt": "star", "references": "saved_view", "saved_view": "dogs"}
    parameters |= {"reference_label_field": "animals", "router": "sam_only"}
    run_operator("segment_concept", dataset, parameters)
    dataset.reload()
    [key] = dataset.list_runs()
    job = SegmentationJob.load(dataset, key)
    assert job.reference_label_ids == view.values("animals.detections.id", unwind=True)
    assert len(job.shared_references(dataset)) == 2


def test_different_references_have_different_keys(make_dataset):
    """The key depends on references outside the dataset; `"auto"` is stored as the selected field."""
    from conceptseg_hf import Reference
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(2)
    first, second = dataset.load_saved_view("targets").values("filepath")
    keys = {
        SegmentationJob(prompt="star", references=[Reference(path, box=box)]).keep(dataset)
        for path in (first, second)
        for box in ((1, 2, 30, 40), (1, 2, 30, 50))
    }
    several = [[(1, 2, 30, 40), (5, 5, 9, 9)], [(1, 2, 30, 40), (5, 5, 9, 8)]]
    keys |= {
        SegmentationJob(prompt="star", references=[Reference(first, boxes=boxes)]).keep(dataset)
        for boxes in several
    }
    assert len(keys) == 6
    ids = dataset.load_saved_view("references").values("id")[:1]
    job = SegmentationJob(prompt="star", reference_ids=ids)
    assert SegmentationJob.load(dataset, job.keep(dataset)).reference_label_field == "ref_boxes"
    with pytest.raises(ValueError, match="several kinds of references are set"):
        SegmentationJob(prompt="star", reference_ids=ids, references=[Reference(first)]).check(dataset)


def test_a_reference_mask_with_several_classes_raises(fo, make_dataset):
    import numpy as np

    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(1)
    sample = dataset.load_saved_view("references").first()
    classes = np.zeros((sample.metadata.height, sample.metadata.width), dtype=np.uint8)
    classes[2:9, 2:9], classes[1, 1:10] = 15, 255
    sample["classes"] = fo.Segmentation(mask=classes)
    sample.save()
    job = SegmentationJob(prompt="star", reference_ids=[sample.id], reference_label_field="classes")
    with pytest.raises(ValueError, match=r"mask contains several classes \(pixel values 15, 255\)"):
        job.check(dataset)
