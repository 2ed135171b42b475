"""Tests of the evaluation backend "conceptseg" and of `find_uncertain`."""

from __future__ import annotations

import numpy as np
import pytest

from conceptseg_hf.evaluation import foreground_iou, score_masks
from conceptseg_hf.images import load_mask

pytestmark = pytest.mark.slow


@pytest.fixture()
def segmented(make_dataset):
    """Return a dataset with predictions for all targets except two."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(12)
    job = SegmentationJob(prompt_field="prompt", router="sam_only", outputs=("segmentation", "heatmap"))
    for _ in segment_collection(dataset.load_saved_view("targets").limit(10), job):
        pass
    return dataset


def pairs(dataset):
    """Return (prediction, ground truth) per target; a missing prediction is an empty mask."""
    masks = []
    for sample in dataset.load_saved_view("targets"):
        ground_truth = load_mask(sample["ground_truth"].mask_path)
        label = sample["concept"]
        masks.append(
            (np.zeros_like(ground_truth) if label is None else load_mask(label.mask_path), ground_truth)
        )
    return masks


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_metrics_equal_score_masks(fo, segmented, protocol):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    names = ("miou", "giou", "ciou", "mae", "ber", "mdice", "f_w", "s_measure")
    results = evaluate_concepts(segmented, eval_key="run", protocol=protocol, metrics=names)
    predictions, ground_truths = zip(*pairs(segmented))
    expected = score_masks(predictions, ground_truths, protocol=protocol, metrics=names)
    values = {metric["key"]: metric["value"] for metric in results.custom_metrics.values()}
    assert values == pytest.approx(expected)
    assert {
        name for name, metric in zip(values, results.custom_metrics.values()) if metric["lower_is_better"]
    } == {
        "mae",
        "ber",
    }
    segmented.reload()
    again = segmented.load_evaluation_results("run")
    assert again.custom_metrics == results.custom_metrics
    if protocol == "standard":
        ious = segmented.load_saved_view("targets").values("run_iou")
        assert ious == pytest.approx([foreground_iou(*pair) for pair in pairs(segmented)])
        assert again.metrics()["recall"] == pytest.approx(
            sum((prediction & ground_truth).sum() for prediction, ground_truth in pairs(segmented))
            / sum(ground_truth.sum() for ground_truth in ground_truths)
        )
    assert segmented.load_saved_view("references").count("run_iou") == 0
    segmented.delete_evaluation("run")
    assert not [name for name in segmented.get_field_schema() if name.startswith("run_")]


def test_report_has_levels_and_groups(segmented):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts
    from conceptseg_hf.integrations.fiftyone.evaluation import report_of

    evaluate_concepts(segmented, eval_key="run")
    table = report_of(segmented, "run").table
    rows = {(row["level"], row["group"]): row for row in table}
    ious = {"CI": [], "CD": [], "CR": []}
    for sample in segmented.load_saved_view("targets"):
        if sample["present"]:
            ious[sample["level"]].append(sample["run_iou"])
    for level, values in ious.items():
        assert rows[level, "all"]["foreground_iou"] == pytest.approx(np.mean(values))
    assert rows["all", "all"]["samples"] == 12
    with pytest.raises(ValueError, match="evaluation 'other' does not exist"):
        report_of(segmented, "other")


def test_heatmap_is_used_for_mae(segmented):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    hard = evaluate_concepts(segmented, metrics=("mae", "giou"))
    soft = evaluate_concepts(segmented, metrics=("mae", "giou"), heatmap_field="concept_heatmap")
    assert soft.custom_metrics["conceptseg_giou"] == hard.custom_metrics["conceptseg_giou"]
    assert soft.custom_metrics["conceptseg_mae"] != hard.custom_metrics["conceptseg_mae"]


def test_evaluate_segmentations_with_method_conceptseg(fo, segmented):
    from conceptseg_hf.integrations.fiftyone import register_evaluation_backend

    register_evaluation_backend()
    results = segmented.evaluate_segmentations("concept", gt_field="ground_truth", method="conceptseg")
    assert results.custom_metrics["conceptseg_giou"]["value"] > 0


def test_missing_fields_and_masks_raise(segmented):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    with pytest.raises(ValueError, match="field 'nothing' is not in the dataset"):
        evaluate_concepts(segmented, pred_field="nothing")
    with pytest.raises(ValueError, match="no sample has a mask in 'ground_truth'"):
        evaluate_concepts(segmented.match({"role": "nobody"}))
    with pytest.raises(ValueError, match="field 'concept' holds no Heatmap"):
        evaluate_concepts(segmented, heatmap_field="concept")


def test_detections_can_be_scored_after_conversion_to_segmentations(segmented):
    """The error message suggests this conversion."""
    import fiftyone.utils.labels as foul

    from conceptseg_hf.integrations.fiftyone import SegmentationJob, evaluate_concepts, segment_collection

    targets = segmented.load_saved_view("targets").exists("concept")
    job = SegmentationJob("objects", prompt_field="prompt", router="sam_only", outputs=("detections",))
    list(segment_collection(targets, job))
    with pytest.raises(ValueError, match="field 'objects' holds no Segmentation"):
        evaluate_concepts(targets, "objects")
    foul.objects_to_segmentations(targets, "objects", "rendered")
    of_objects, of_masks = evaluate_concepts(targets, "rendered"), evaluate_concepts(targets)
    giou = [results.custom_metrics["conceptseg_giou"]["value"] for results in (of_objects, of_masks)]
    assert giou[0] == pytest.approx(giou[1], abs=1)  # boxes are rounded to integer pixels


def test_replaced_masks_are_reported(segmented):
    """The report contains the scores of the run, without the routes of newer labels."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, evaluate_concepts, segment_collection
    from conceptseg_hf.integrations.fiftyone.evaluation import replaced_since, report_of

    evaluate_concepts(segmented, eval_key="run")
    before = report_of(segmented, "run").table
    assert replaced_since(segmented, "run") == []
    ids = segmented.load_saved_view("targets").values("id")
    replaced = ids[:3] + ids[-1:]  # the last sample had no prediction
    job = SegmentationJob(prompt_field="prompt", router="full_reasoning")
    list(segment_collection(segmented.select(replaced), job))
    assert replaced_since(segmented, "run") == replaced
    after = report_of(segmented, "run").table
    assert [row["masks"] for row in after] == [row["masks"] for row in before]
    assert after[-1]["shortcut_share"] == before[-1]["shortcut_share"] == 1


def test_uncertain_samples_are_tagged(segmented):
    from conceptseg_hf.integrations.fiftyone import find_uncertain
    from conceptseg_hf.integrations.fiftyone.uncertainty import TAGS

    targets = list(segmented.load_saved_view("targets").exists("concept"))
    near, failed, wrong = targets[:3]
    near["concept"]["threshold"] = near["concept"]["presence"] + 0.02
    for sample in targets[1:]:
        sample["concept"]["threshold"] = 2.0  # above any presence
    failed["concept"]["check_iou"] = 0.1
    wrong["concept"]["error"] = "error of the test."
    for sample in targets:
        sample.save()
    found = find_uncertain(segmented)
    assert found == {"presence": [near.id], "check": [failed.id], "error": [wrong.id]}
    assert segmented.match_tags(TAGS["check"]).values("id") == [failed.id]

    # A second search replaces the tags of the first; equal masks agree.
    segmented.clone_sample_field("concept", "other")
    found = find_uncertain(segmented, margin=0, check_iou=0, other_field="other", routes_iou=0.99)
    assert not any(found[reason] for reason in ("presence", "check", "routes"))
    assert segmented.count_sample_tags() == {TAGS["error"]: 1}
    with pytest.raises(ValueError, match="field 'ground_truth' holds no predictions"):
        find_uncertain(segmented, field="ground_truth")


def test_a_failing_run_does_not_replace_the_stored_run(segmented):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    stored = evaluate_concepts(segmented, eval_key="run").custom_metrics
    segmented.clone_sample_field("concept", "other")
    segmented.add_sample_field("mine_iou", segmented.get_field("run_iou").__class__)
    nobody = segmented.match({"role": "nobody"})
    for samples, arguments, fault in (
        (nobody, {"eval_key": "run"}, "no sample has a mask in 'ground_truth'"),
        (segmented, {"eval_key": "run", "protocol": "nothing"}, "protocol"),
        (segmented, {"eval_key": "run", "metrics": ["nothing"]}, "no metric is named 'nothing'"),
        (segmented, {"eval_key": "run", "pred_field": "other"}, "evaluation 'run' uses other fields"),
        (segmented, {"eval_key": "mine"}, "field 'mine_iou' already exists"),
        (segmented, {"eval_key": "no name"}, "run name 'no name' is invalid"),
    ):
        with pytest.raises(ValueError, match=fault):
            evaluate_concepts(samples, **arguments)
    assert segmented.list_evaluations() == ["run"]
    assert segmented.load_evaluation_results("run").custom_metrics == stored
    assert segmented.count("run_iou") == 12


def test_a_run_of_another_method_is_not_replaced(segmented):
    """FiftyOne's default evaluation of the same fields is kept."""
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    theirs = segmented.evaluate_segmentations("concept", gt_field="ground_truth", eval_key="simple")
    with pytest.raises(ValueError, match="evaluation 'simple' uses other fields or another method"):
        evaluate_concepts(segmented, eval_key="simple")
    assert segmented.load_evaluation_results("simple").metrics() == theirs.metrics()


def test_samples_that_cannot_be_scored_are_skipped_and_reported(segmented, tmp_path):
    from PIL import Image

    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    first, second, *_ = segmented.load_saved_view("targets").exists("concept")
    Image.new("L", (20, 30)).save(tmp_path / "small.png")
    first["ground_truth"].mask_path = str(tmp_path / "small.png")
    second["concept"].mask_path = str(tmp_path / "gone.png")
    first.save(), second.save()
    results = evaluate_concepts(segmented, eval_key="run")
    assert results.backend.unscored.keys() == {first.id, second.id}
    assert segmented.count("run_iou") == 10


def test_user_fields_of_another_type_are_not_used_as_levels(segmented):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts
    from conceptseg_hf.integrations.fiftyone.evaluation import report_of

    segmented.delete_sample_field("level")
    segmented.set_values("level", [None if index % 2 else 3 for index in range(len(segmented))])
    evaluate_concepts(segmented, eval_key="run")
    assert {row["level"] for row in report_of(segmented, "run").table} == {"?", "all"}


def test_gt_masks_of_similar_size_are_resized(segmented, tmp_path):
    """As in `conceptseg evaluate`: rounding and scale are allowed, other sizes only with the protocol "paper"."""
    import numpy as np
    from PIL import Image

    from conceptseg_hf.images import load_mask
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    before = evaluate_concepts(segmented, eval_key="before").backend.unscored
    doubled, padded, other, *_ = segmented.load_saved_view("targets").exists("concept")
    pixels = [np.asarray(Image.open(sample["ground_truth"].mask_path)) for sample in (doubled, padded)]
    grown = np.pad(pixels[1], ((0, 2), (0, 1)))
    stored = (pixels[0].repeat(2, 0).repeat(2, 1), grown, np.full((30, 20), 255, np.uint8))
    for number, (sample, values) in enumerate(zip((doubled, padded, other), stored)):
        Image.fromarray(values).save(tmp_path / f"{number}.png")
        sample["ground_truth"].mask_path = str(tmp_path / f"{number}.png")
        sample.save()
    unscored = evaluate_concepts(segmented, eval_key="sized").backend.unscored
    assert not before and unscored.keys() == {other.id}
    assert "ground-truth mask has 20 x 30 pixels, but the predicted mask has 128 x 128" in unscored[other.id]
    segmented.reload()
    assert segmented[doubled.id]["sized_iou"] == segmented[doubled.id]["before_iou"]
    columns, rows = (np.floor((np.arange(128) + 0.5) * n / 128).astype(int) for n in (129, 130))
    ground_truth = load_mask(grown)[rows][:, columns]
    mask = load_mask(segmented[padded.id]["concept"].mask_path)
    union = (mask | ground_truth).sum()
    assert segmented[padded.id]["sized_iou"] == pytest.approx(
        (mask & ground_truth).sum() / union if union else 1.0
    )
    assert not evaluate_concepts(segmented, eval_key="paper", protocol="paper").backend.unscored
    assert segmented.reload() is None and segmented[other.id]["paper_tp"] is not None
