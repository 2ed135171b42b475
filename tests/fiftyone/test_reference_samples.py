"""Tests of references that are samples: validation before a run, label fields, boxes and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture()
def samples(fo, tmp_path):
    """Return a dataset of three images with 60 x 40 pixels."""
    dataset = fo.Dataset("references-of-a-user")
    for name in "abc":
        Image.new("RGB", (60, 40), "gray").save(tmp_path / f"{name}.png")
        dataset.add_sample(fo.Sample(filepath=str(tmp_path / f"{name}.png")))
    yield dataset
    dataset.delete()


def box(fo, *values):
    return fo.Detections(detections=[fo.Detection(label="this", bounding_box=list(values))])


def mask(fo, size=(40, 60), value=0):
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[5:9, 5:9] = value
    return fo.Segmentation(mask=pixels)


FAULTS = {
    "no_width": (lambda fo: box(fo, 0.1, 0.1, 0, 0.5), "a box in 'marks' has no extent"),
    "negative_height": (lambda fo: box(fo, 0.1, 0.9, 0.5, -0.5), "a box in 'marks' has no extent"),
    "not_a_number": (lambda fo: box(fo, 0.1, 0.1, float("nan"), 0.5), "a box in 'marks' has no extent"),
    "no_box": (
        lambda fo: fo.Detections(detections=[fo.Detection(label="3d")]),
        "a box in 'marks' has no extent",
    ),
    "in_pixels": (lambda fo: box(fo, 10, 10, 20, 20), "a box in 'marks' lies outside the image"),
    "left_of_it": (lambda fo: box(fo, -0.5, 0.1, 0.5, 0.5), "a box in 'marks' lies outside the image"),
    "less_than_a_pixel": (lambda fo: box(fo, 0.001, 0.001, 0.005, 0.005), "lies within one pixel"),
    "empty_mask": (lambda fo: mask(fo), "mask has no foreground pixel"),
    "another_size": (
        lambda fo: mask(fo, (20, 30), 255),
        "mask has 30 x 20 pixels, but its image has 60 x 40",
    ),
    "lost_mask": (lambda fo: fo.Segmentation(mask_path="/nowhere.png"), "'/nowhere.png' is not a file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_shared_references_are_validated_before_the_run(fo, samples, fault):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    make, message = FAULTS[fault]
    good, bad, *_ = samples
    good["marks"] = (
        box(fo, 0.1, 0.1, 0.5, 0.5) if "mask" not in fault and "size" not in fault else mask(fo, value=255)
    )
    bad["marks"] = make(fo)
    good.save()
    bad.save()
    job = SegmentationJob(prompt="star", reference_ids=[good.id, bad.id], reference_label_field="marks")
    for attempt in (lambda: job.check(samples), lambda: next(segment_collection(samples, job))):
        with pytest.raises(ValueError) as refused:
            attempt()
        assert str(refused.value).startswith("reference 'b.png' cannot be used: ") and message in str(
            refused.value
        )
    assert not samples.has_field("concept")


def test_unreadable_references_raise_with_their_file_name(fo, samples, tmp_path):
    from conceptseg_hf import Reference
    from conceptseg_hf.integrations.fiftyone import ConceptSegFiftyOneModel, SegmentationJob

    (tmp_path / "b.png").write_bytes(b"not an image")
    job = SegmentationJob(prompt="star", reference_ids=samples.values("id")[:2], reference_label_field=None)
    with pytest.raises(
        ValueError, match=r"reference 'b.png' cannot be used: image .* damaged or not an image"
    ):
        job.check(samples)
    outside = [Reference(tmp_path / "a.png"), Reference(tmp_path / "c.png", box=(3, 3, 3, 9))]
    for attempt in (
        lambda: SegmentationJob(prompt="star", references=outside).check(samples),
        lambda: ConceptSegFiftyOneModel(prompt="star", references=outside),
    ):
        with pytest.raises(
            ValueError, match=r"reference 'c.png' cannot be used: box is \(3.0, 3.0, 3.0, 9.0\)"
        ):
            attempt()


def test_invalid_references_of_single_samples_are_reported_at_the_start(fo, make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(9)
    targets = (
        dataset.load_saved_view("targets").exists("reference_ids").match({"reference_ids.0": {"$ne": None}})
    )
    first, second, *others = targets
    flat, damaged = (dataset[target["reference_ids"][-1]] for target in (first, second))
    flat["ref_boxes"] = box(fo, 0.2, 0.2, 0, 0.1)
    flat.save()
    content = Path(damaged.filepath).read_bytes()
    Path(damaged.filepath).write_bytes(content[:100])
    job = SegmentationJob(prompt_field="prompt", reference_ids_field="reference_ids", router="sam_only")
    run = segment_collection(targets, job)
    start = next(run)
    assert start.done == 0 and start.bad_references.keys() == {flat.filepath, damaged.filepath}
    assert "has no extent" in start.bad_references[flat.filepath]
    assert "2 references cannot be used (" in str(start)
    *_, progress = run
    assert progress.errors.keys() == {first.id, second.id} and others
    assert progress.errors[first.id].startswith(f"reference {flat.filename!r} cannot be used: ")


def test_auto_selects_the_field_that_marks_the_references(fo, samples):
    """The most likely field is selected if no other field marks more of the references."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob
    from conceptseg_hf.integrations.fiftyone.reference_samples import AUTO, resolve_label_field

    first, second, third = samples
    first["ref_boxes"] = box(fo, 0.1, 0.1, 0.5, 0.5)
    second["mine"] = third["mine"] = box(fo, 0.1, 0.1, 0.5, 0.5)
    for sample in (first, second, third):
        sample.save()

    def resolve(*chosen):
        return resolve_label_field(samples, AUTO, [sample.id for sample in chosen])

    assert resolve_label_field(samples, AUTO) == resolve(first) == "ref_boxes"
    assert resolve(second) == resolve(second, third) == resolve(first, second, third) == "mine"
    assert resolve(first, second) == "ref_boxes"  # a tie
    job = SegmentationJob(prompt="star", reference_ids=[second.id, third.id])
    job.check(samples)
    assert [reference.box for reference in job.shared_references(samples)] == [(6, 4, 36, 24)] * 2
    assert SegmentationJob.load(samples, job.keep(samples)).reference_label_field == "mine"


def test_boxes_have_integer_coordinates(fo, samples):
    """29 / 100 * 100 is less than 29 in floating point, and the mosaic rounds down."""
    from conceptseg_hf.integrations.fiftyone import references_from

    sample = samples.first()
    Image.new("RGB", (100, 100)).save(sample.filepath)
    sample["marks"] = box(fo, 29 / 100, 57 / 100, 28 / 100, 30 / 100)
    [reference] = references_from([sample], "marks")
    assert reference.box == (29, 57, 57, 87)


def test_boxes_together_creates_one_reference_per_sample(fo, samples):
    """By default, each box is a separate reference in a separate cell of the mosaic."""
    from conceptseg_hf.integrations.fiftyone import ConceptSegFiftyOneModel, SegmentationJob, references_from
    from conceptseg_hf.integrations.fiftyone.runs import load_run

    first, second, _ = samples
    for sample in (first, second):  # in pixels of 60 x 40: (6, 4, 36, 24) and (30, 20, 60, 40)
        detections = [
            fo.Detection(label="mark", bounding_box=corner)
            for corner in ([0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5])
        ]
        sample["marks"] = fo.Detections(detections=detections)
        sample.save()
    chosen = [first, second]
    separate = references_from(chosen, "marks")
    assert [reference.box for reference in separate] == [(6, 4, 36, 24), (30, 20, 60, 40)] * 2
    together = references_from(chosen, "marks", boxes_together=True)
    assert [reference.box for reference in together] == [None, None]
    assert [reference.boxes for reference in together] == [[(6, 4, 36, 24), (30, 20, 60, 40)]] * 2
    ids = [first["marks"].detections[0].id]
    [one] = references_from([first], "marks", label_ids=ids, boxes_together=True)
    assert one.box == (6, 4, 36, 24) and one.boxes is None

    settings = {"prompt": "star", "reference_ids": [first.id, second.id], "reference_label_field": "marks"}
    jobs = [SegmentationJob(**settings, boxes_together=together) for together in (False, True)]
    assert [len(job.shared_references(samples)) for job in jobs] == [4, 2]
    plain, joined = (job.keep(samples) for job in jobs)
    assert plain != joined
    assert [SegmentationJob.load(samples, key).boxes_together for key in (plain, joined)] == [False, True]
    assert "boxes_together" not in load_run(samples, plain), "keys of earlier runs must not change"

    first["reference_ids"] = [second.id]
    first.save()
    model = ConceptSegFiftyOneModel(
        prompt="star", reference_field="reference_ids", reference_label_field="marks", boxes_together=True
    )
    assert [len(reference.boxes) for reference in model._references_of(first)] == [2]
