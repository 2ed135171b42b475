"""Tests of the segmentation loop in the operator, in delegated runs and in Python."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from fake_pipeline import FakePipeline
from PIL import Image

pytestmark = pytest.mark.slow

OWN = {"prompt_source": "field", "prompt_field": "prompt", "references": "own"}

WORKER = """
import sys
from fiftyone.operators.delegated import DelegatedOperationService
DelegatedOperationService().execute_queued_operations(dataset_name=sys.argv[1])
"""


def masks(dataset, field):
    """Return the masks of the targets by sample id."""
    view = dataset.load_saved_view("targets")
    return {sample.id: sample[field].get_mask() for sample in view.exists(field)}


def full_masks(items, **settings):
    """Return results with masks that contain all pixels."""
    masks = [Image.new("L", Image.open(item["image"]).size, 255) for item in items]
    return [{"mask": mask, "label": "star", "score": 1.0} for mask in masks]


def assert_equal_masks(first, second):
    assert first.keys() == second.keys() and first
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_operator_delegated_run_and_apply_model_have_equal_masks(
    fo, make_dataset, run_operator, run_queued, folder
):
    from fiftyone.operators.delegated import DelegatedOperationService

    from conceptseg_hf.integrations.fiftyone import ConceptSegFiftyOneModel, declare_prediction_fields

    dataset = make_dataset(12)
    run_operator("segment_concept", dataset, OWN | {"field": "immediate"})
    run_operator("segment_concept", dataset, OWN | {"field": "delegated"}, request_delegation=True)
    dataset.reload()
    assert dataset.count("immediate") == 12 and not dataset.has_field("delegated")
    service = DelegatedOperationService()
    run_queued(dataset)
    declare_prediction_fields(dataset, "applied")
    dataset.load_saved_view("targets").apply_model(
        ConceptSegFiftyOneModel(),
        "applied",
        prompt_field="prompt",
        reference_field="reference_ids",
        batch_size=5,
        output_dir=str(folder / dataset.name),
    )
    dataset.reload()
    immediate = masks(dataset, "immediate")
    assert len(immediate) == 12 and any(mask.any() for mask in immediate.values())
    assert_equal_masks(immediate, masks(dataset, "delegated"))
    assert_equal_masks(immediate, masks(dataset, "applied"))
    for name in ("route", "rule", "answer", "prompt"):
        assert dataset.values(f"immediate.{name}") == dataset.values(f"applied.{name}")
    for name in ("presence", "check_iou"):
        targets = dataset.exists(f"immediate.{name}")
        assert targets.values(f"immediate.{name}") == pytest.approx(
            targets.values(f"applied.{name}"), abs=1e-4
        )
    [operation] = service.list_operations(dataset_name=dataset.name)
    assert (operation.run_state, operation.status.progress) == ("completed", 1.0)


def test_labels_equal_the_pipeline_outputs(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, get_pipeline, segment_collection

    dataset = make_dataset(8)
    targets = dataset.load_saved_view("targets")
    job = SegmentationJob(prompt="star", router="sam_only", outputs=("segmentation", "detections", "heatmap"))
    *_, progress = segment_collection(targets, job)
    assert str(progress) == "8 of 8 segmented"
    for sample in dataset.load_saved_view("targets"):
        result = get_pipeline()(sample.filepath, prompt="star", router="sam_only", return_heatmap=True)
        mask = np.asarray(result["mask"])
        assert np.array_equal(sample["concept"].get_mask(), mask)
        assert sample["concept"]["presence"] == pytest.approx(result["presence"], abs=1e-4)
        assert np.allclose(sample["concept_heatmap"].get_map() / 255, result["heatmap"], atol=1 / 255)
        detections = sample["concept_detections"]
        restored = detections.to_segmentation(frame_size=mask.shape[::-1], mask_targets={255: "star"}).mask
        assert np.array_equal(restored, mask)


def test_errors_of_samples_do_not_affect_other_samples(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection
    from conceptseg_hf.integrations.fiftyone.loop import pending_ids

    dataset = make_dataset(9)
    damaged, promptless, missing_references, *_ = list(
        dataset.load_saved_view("targets").match({"level": "CD"})
    )
    content = Path(damaged.filepath).read_bytes()
    Path(damaged.filepath).write_bytes(content[:200])
    promptless["prompt"] = None
    promptless.save()
    missing_references["reference_ids"] = ["0" * 24, "no id"]
    missing_references.save()
    job = SegmentationJob(
        prompt_field="prompt", reference_ids_field="reference_ids", batch_size=4, skip_existing=True
    )
    targets = dataset.load_saved_view("targets")
    *_, progress = segment_collection(targets, job)
    assert progress.done == 9 and set(progress.errors) == {damaged.id, promptless.id, missing_references.id}
    assert "damaged" in progress.errors[damaged.id]
    assert "prompt field 'prompt' is empty" in progress.errors[promptless.id]
    assert "references are not in the dataset" in progress.errors[missing_references.id]
    assert len(dataset.match({"concept.mask_path": {"$ne": None}})) == 6
    assert set(dataset.match({"concept.error": {"$ne": None}}).values("id")) == set(progress.errors)

    # Only the failed samples are retried.
    Path(damaged.filepath).write_bytes(content)
    targets = dataset.load_saved_view("targets")
    assert set(pending_ids(targets, job)) == set(progress.errors)
    *_, again = segment_collection(targets, job)
    assert (again.total, again.skipped, set(again.errors)) == (3, 6, {promptless.id, missing_references.id})


def test_images_of_one_pixel_height_have_detections(fo, make_dataset, tmp_path):
    """FiftyOne's own conversion creates no detections from a mask that is one pixel high."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(1)
    Image.new("RGB", (64, 1)).save(tmp_path / "line.png")
    line = fo.Sample(filepath=str(tmp_path / "line.png"))
    dataset.add_sample(line)
    job = SegmentationJob(prompt="star", router="sam_only", outputs=("detections",))
    *_, progress = segment_collection(dataset.select(line.id), job, pipeline=FakePipeline(full_masks))
    assert progress.done == 1 and progress.errors == {}
    [detection] = line["concept"].detections
    assert detection.bounding_box == [0, 0, 1, 1] and detection.mask.shape == (1, 64) and detection.mask.all()


def test_a_mask_that_cannot_be_written_does_not_end_the_run(fo, make_dataset, tmp_path):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection
    from conceptseg_hf.integrations.fiftyone.files import write_image

    targets = make_dataset(3).load_saved_view("targets")
    unwritable = targets.first()
    name = write_image(
        Image.new("L", Image.open(unwritable.filepath).size, 255), tmp_path / "masks", unwritable.id
    )
    Path(name).unlink()
    Path(name).mkdir()  # so that no file can be written there
    job = SegmentationJob(prompt="star", router="sam_only", folder=tmp_path)
    *_, progress = segment_collection(targets, job, pipeline=FakePipeline(full_masks))
    assert progress.done == 3 and progress.errors.keys() == {unwritable.id}
    assert "mask cannot be written" in progress.errors[unwritable.id]
    assert [mask.any() for mask in masks(unwritable._dataset, "concept").values()] == [False, True, True]


def test_a_sample_that_is_its_own_reference_has_an_error(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(4)
    targets = dataset.load_saved_view("targets")
    self_referencing = targets.first()
    self_referencing["reference_ids"] = [self_referencing.id]
    self_referencing.save()
    job = SegmentationJob(prompt="star", reference_ids_field="reference_ids", router="sam_only")
    *_, progress = segment_collection(targets, job)
    assert progress.errors == {
        self_referencing.id: "sample is listed among its own references; remove it from the list."
    }


def test_samples_deleted_during_the_run_have_an_error(make_dataset):
    """They are deleted before they are read, or before their labels are saved."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, get_pipeline, segment_collection

    dataset = make_dataset(6)
    targets = dataset.load_saved_view("targets")
    first, read, waiting, *others = targets.values("id")

    def delete_samples(items, **settings):
        if progress.done == 1:
            dataset.delete_samples([read, waiting])
        return get_pipeline()(items, **settings)

    job = SegmentationJob(prompt_field="prompt", router="sam_only", batch_size=1)
    for progress in segment_collection(targets, job, pipeline=FakePipeline(delete_samples)):  # noqa: B007 (used in `delete_samples`)
        pass
    assert str(progress) == "6 of 6 segmented, 2 with an error"
    assert progress.errors == dict.fromkeys((read, waiting), "sample was deleted during the run.")
    assert dataset.exists("concept").values("id") == [first, *others]


def test_a_killed_run_keeps_its_predictions_and_can_be_resumed(fo, make_dataset, run_operator, run_queued):
    from fiftyone.operators.delegated import DelegatedOperationService

    dataset = make_dataset(30)
    params = OWN | {"skip_existing": True, "batch_size": 2, "router": "full_reasoning"}
    run_operator("segment_concept", dataset, params, request_delegation=True)
    worker = subprocess.Popen([sys.executable, "-c", WORKER, dataset.name])
    try:
        while not dataset.has_field("concept") or dataset.count("concept") < 6:
            assert worker.poll() is None
            time.sleep(0.05)
            dataset.reload()
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    dataset.reload()
    written = dict(zip(*dataset.exists("concept").values(["id", "concept.mask_path"])))
    assert 6 <= len(written) < 30
    for path in written.values():
        with Image.open(path) as image:
            image.load()
            assert image.size == (128, 128)

    service = DelegatedOperationService()
    [operation] = service.list_operations(dataset_name=dataset.name)
    assert operation.run_state == "running"  # permanently: FiftyOne does not detect a killed worker
    service.set_failed(operation.id)
    again = service.rerun_operation(operation.id)
    run_queued(dataset)
    dataset.reload()
    assert dataset.count("concept") == 30
    after = dict(zip(*dataset.exists("concept").values(["id", "concept.mask_path"])))
    assert written.items() <= after.items()
    assert f"{30 - len(written)} of {30 - len(written)} segmented" in service.get(again.id).status.label


def test_references_are_read_from_boxes_and_masks(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import references_from, view_with_references

    dataset = make_dataset(12)
    target = dataset.match({"group": "camouflage", "role": "target"}).first()
    samples = list(dataset.select(target["reference_ids"], ordered=True))
    references = references_from(samples, "ref_boxes")
    first = samples[0]["ref_boxes"].detections[0].bounding_box
    assert references[0].box == pytest.approx(
        (first[0] * 64, first[1] * 64, (first[0] + first[2]) * 64, (first[1] + first[3]) * 64)
    )
    assert {reference.role for reference in references} == {"auto"}
    assert {reference.role for reference in references_from(samples, "ref_boxes", proxy=False)} == {"support"}
    [masked] = references_from([target], "ground_truth")
    assert masked.mask == target["ground_truth"].mask_path
    with pytest.raises(ValueError, match="has no box or mask in 'ref_boxes'"):
        references_from([target], "ref_boxes")
    assert [reference.box for reference in references_from([target], None)] == [None]
    with pytest.raises(ValueError, match="at most 9"):
        references_from(list(dataset.match({"role": "reference"}).exists("ref_boxes"))[:10], "ref_boxes")
    view = view_with_references(dataset, [target.id])
    assert view.values("id") == [*target["reference_ids"], target.id]


def test_the_loop_calls_the_model_once_per_batch_and_frees_the_masks(make_dataset):
    """`make bench` measures the time and memory overhead."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, get_pipeline, segment_collection

    dataset = make_dataset(20)
    batches, masks_of = [], []

    def record_batches(items, **settings):
        results = get_pipeline()(items, **settings)
        batches.append(len(items))
        masks_of.append([weakref.ref(result["mask"]) for result in results])
        return results

    job = SegmentationJob(prompt="star", router="sam_only", batch_size=8)
    for _ in segment_collection(
        dataset.load_saved_view("targets"), job, pipeline=FakePipeline(record_batches)
    ):
        gc.collect()
        alive = [sum(mask() is not None for mask in masks) for masks in masks_of[:-1]]
        assert not any(alive), "masks of earlier batches"
    assert batches == [8, 8, 4]


def test_the_pipeline_is_cached_and_released(fo, make_dataset, run_operator):
    from conceptseg_hf.integrations.fiftyone import get_pipeline, release_models

    release_models()
    first = get_pipeline()
    assert get_pipeline() is first
    assert run_operator("release_model").result == {"released": 1}
    assert get_pipeline() is not first
    with pytest.raises(ValueError, match="checkpoint 'nowhere' was not found"):
        get_pipeline("nowhere")


def test_grouped_datasets_with_all_slices_and_with_one(fo, folder):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, find_uncertain, segment_collection

    dataset = fo.Dataset("grouped")
    try:
        dataset.add_group_field("group", default="left")
        for number in range(3):
            group = fo.Group()
            for slice_ in ("left", "right"):
                path = folder / f"{slice_}{number}.png"
                Image.new("RGB", (64, 48), "gray").save(path)
                box = fo.Detection(label="this", bounding_box=[0.2, 0.2, 0.4, 0.4])
                dataset.add_sample(
                    fo.Sample(
                        filepath=str(path), group=group.element(slice_), marks=fo.Detections(detections=[box])
                    )
                )
        everything = dataset.select_group_slices(media_type="image")
        reference = dataset.select_group_slices("right").first().id
        job = SegmentationJob(prompt="star", reference_ids=[reference], batch_size=2)
        *_, progress = segment_collection(everything, job)
        assert (progress.total, progress.done, progress.errors) == (5, 5, {})
        assert everything.count("concept") == 5
        *_, progress = segment_collection(dataset, SegmentationJob(prompt="star", field="shown"))
        assert progress.done == 3 and everything.count("shown") == 3
        found = find_uncertain(everything, margin=1)
        assert len(found["presence"]) == 5
        assert len(everything.match_tags("uncertain: presence near threshold")) == 5
    finally:
        fo.delete_dataset("grouped")


def test_patches_and_videos_are_rejected(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    job = SegmentationJob(prompt="star")
    with pytest.raises(ValueError, match="samples are a view of patches"):
        job.check(make_dataset(2).to_patches("ref_boxes"))
    video = fo.Dataset("moving")
    try:
        video.add_sample(fo.Sample(filepath="nothing.mp4"))
        with pytest.raises(ValueError, match="samples have media type 'video'"):
            job.check(video)
    finally:
        fo.delete_dataset("moving")
