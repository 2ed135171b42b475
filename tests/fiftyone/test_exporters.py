"""Tests that FiftyOne's exporters accept all predicted labels, including errors and empty masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_pipeline import FakePipeline
from PIL import Image

DETECTIONS = (
    *(
        "COCODetectionDataset",
        "VOCDetectionDataset",
        "KITTIDetectionDataset",
        "YOLOv4Dataset",
        "YOLOv5Dataset",
    ),
    *("CVATImageDataset", "BDDDataset", "FiftyOneImageDetectionDataset", "FiftyOneImageLabelsDataset"),
    *("ImageSegmentationDirectory", "ImageClassificationDirectoryTree", "FiftyOneImageClassificationDataset"),
)
EVERYTHING = ("FiftyOneDataset", "LegacyFiftyOneDataset", "CSVDataset", "ImageDirectory", "MediaDirectory")
EXPORTS = [
    *(("concept_detections", name) for name in DETECTIONS),
    ("concept", "ImageSegmentationDirectory"),
    *((field, name) for field in ("concept", "concept_detections", "concept_heatmap") for name in EVERYTHING),
    ("ground_truth", "ImageSegmentationDirectory"),
    ("ref_boxes", "COCODetectionDataset"),
]
READ_BACK = (
    "COCODetectionDataset",
    "VOCDetectionDataset",
    "YOLOv4Dataset",
    "YOLOv5Dataset",
    "CVATImageDataset",
)
REGIONS = {(5, 3, 20, 9), (30, 20, 31, 50)}  # x1, y1, x2, y2


def two_regions(items, **settings):
    """Return results with two regions per image, and with the text attributes of the model."""
    results = []
    for item in items:
        width, height = Image.open(item["image"]).size
        mask = np.zeros((height, width), dtype=np.uint8)
        for x1, y1, x2, y2 in REGIONS:
            mask[y1:y2, x1:x2] = 255
        attributes = {
            "think": "two of them",
            "rule": "the same shape",
            "answer": "an answer",
            "route": "reasoning",
        }
        results.append({"mask": Image.fromarray(mask), "label": "an answer", "score": 0.5, **attributes})
        results[-1]["heatmap"] = mask.astype(np.float32) / 255
        results[-1] |= {"presence": 0.1, "threshold": 0.5, "decode_presence": 0.9, "check_iou": 0.7}
    results[-1]["mask"] = Image.new("L", results[-1]["mask"].size)  # empty mask for the last item
    return results


@pytest.fixture(scope="module")
def predicted(fo):
    """Return five targets: two with regions, one with an empty mask, one with an error, one without a prediction."""
    from conceptseg_hf.integrations.fiftyone import (
        SegmentationJob,
        load_concept_benchmark,
        segment_collection,
    )

    dataset = load_concept_benchmark(limit=5, dataset_name="exported")
    targets = dataset.load_saved_view("targets")
    failed = targets.first()
    failed["prompt"] = None
    failed.save()
    outputs = ("segmentation", "detections", "heatmap")
    job = SegmentationJob(prompt_field="prompt", outputs=outputs, batch_size=4)
    *_, progress = segment_collection(targets.limit(4), job, pipeline=FakePipeline(two_regions))
    assert (progress.done, len(progress.errors)) == (4, 1)
    job = SegmentationJob("chosen", prompt_field="prompt", outputs=("detections",), label="rust")
    list(segment_collection(targets.limit(4), job, pipeline=FakePipeline(two_regions)))
    yield dataset
    fo.delete_dataset("exported")


@pytest.mark.parametrize(("field", "name"), EXPORTS)
def test_exporter_accepts_all_labels(fo, predicted, tmp_path, field, name):
    import fiftyone.types as fot

    samples = predicted.load_saved_view("targets") if field != "ref_boxes" else predicted.exists(field)
    samples.export(export_dir=str(tmp_path / "out"), dataset_type=getattr(fot, name), label_field=field)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_all_exporters_of_these_labels_are_tested(fo, predicted, tmp_path):
    """`EXPORTS` contains all dataset types for which FiftyOne's exporters accept these labels."""
    import fiftyone.types as fot
    from fiftyone.utils.data.exporters import LabeledImageDatasetExporter

    excluded = {"TFObjectDetectionDataset", "TFImageClassificationDataset"}  # require TensorFlow
    for name in fot.__all__:
        kind = getattr(fot, name)
        if not isinstance(kind, type) or name in excluded or not issubclass(kind, fot.LabeledImageDataset):
            continue
        try:
            exporter = kind().get_dataset_exporter_cls()
        except (TypeError, ImportError):
            continue
        if not issubclass(exporter, LabeledImageDatasetExporter):
            continue
        try:
            label_cls = exporter(export_dir=str(tmp_path / name)).label_cls
        except ImportError:
            continue
        classes = label_cls.values() if isinstance(label_cls, dict) else [label_cls]
        accepted = {one for some in classes for one in (some if isinstance(some, (list, tuple)) else [some])}
        if fo.Detections in accepted:
            assert ("concept_detections", name) in EXPORTS
        if fo.Segmentation in accepted:
            assert ("concept", name) in EXPORTS


def test_coco_export_has_boxes_prompts_and_answers(predicted, tmp_path):
    import fiftyone.types as fot

    targets = predicted.load_saved_view("targets")
    targets.export(
        export_dir=str(tmp_path), dataset_type=fot.COCODetectionDataset, label_field="concept_detections"
    )
    content = json.loads((tmp_path / "labels.json").read_text())
    classes = {category["id"]: category["name"] for category in content["categories"]}
    annotations = content["annotations"]
    assert len(annotations) == 2 * len(REGIONS)
    with_regions = [
        sample
        for sample in targets
        if sample["concept_detections"] and sample["concept_detections"].detections
    ]
    assert set(classes.values()) == {sample["prompt"] for sample in with_regions}
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        assert tuple(round(value, 6) for value in (x, y, x + width, y + height)) in REGIONS
        assert (annotation["answer"], annotation["score"]) == ("an answer", 0.5)
        assert annotation["prompt"] == classes[annotation["category_id"]]


@pytest.mark.parametrize("name", READ_BACK)
def test_label_is_the_only_exported_class(fo, predicted, tmp_path, name):
    import fiftyone.types as fot

    kind = getattr(fot, name)
    targets = predicted.load_saved_view("targets")
    targets.export(export_dir=str(tmp_path), dataset_type=kind, label_field="chosen")
    read = fo.Dataset.from_dir(dataset_dir=str(tmp_path), dataset_type=kind, label_field="read")
    try:
        path = "read" if read.has_field("read.detections") else "read_detections"
        path = path if read.has_field(f"{path}.detections") else "detections"
        assert read.count_values(f"{path}.detections.label") == {"rust": 2 * len(REGIONS)}
    finally:
        read.delete()


def test_exported_masks_equal_the_predictions(predicted, tmp_path):
    import fiftyone.types as fot

    targets = predicted.load_saved_view("targets").exists("concept")
    for field in ("concept", "concept_detections"):
        folder, kind = str(tmp_path / field), fot.ImageSegmentationDirectory
        targets.export(export_dir=folder, dataset_type=kind, label_field=field)
    for sample in targets:
        stem = sample.filename.rsplit(".", 1)[0]
        mask = np.asarray(Image.open(tmp_path / "concept" / "labels" / f"{stem}.png"))
        again = np.asarray(Image.open(tmp_path / "concept_detections" / "labels" / f"{stem}.png"))
        assert np.array_equal(mask > 0, sample["concept"].get_mask() > 0)
        assert np.array_equal(again > 0, mask > 0)


def test_mask_targets_have_the_label_of_the_runs(make_dataset):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(4)
    targets = dataset.load_saved_view("targets")

    def run(samples, label):
        job = SegmentationJob(prompt="star", router="sam_only", label=label)
        list(segment_collection(samples, job, pipeline=FakePipeline(two_regions)))
        return dataset.mask_targets["concept"]

    assert run(targets, None) == {255: "concept"}
    assert run(targets, "rust") == {255: "rust"}
    assert run(targets.limit(2), "dent") == {255: "concept"}  # the field holds predictions of both runs
    assert run(targets, "dent") == {255: "dent"}
    dataset.mask_targets = {"concept": {255: "mine"}}
    assert run(targets, None) == {255: "mine"}  # "mine" is not the label of a run
    with pytest.raises(ValueError, match="label is empty"):
        run(targets, " ")
