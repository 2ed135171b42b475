"""Tests of evaluating hand-made masks: classes, ignored pixels, heatmaps, stored runs and their reports."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

PLUGIN = "@conceptseg/conceptseg"


@pytest.fixture()
def make_dataset_of(fo, request):
    """Return a function that creates a dataset from lists of field values, one per sample."""
    names = []

    def make(**fields):
        names.append(f"masks-{request.node.name[:50]}-{len(names)}".replace("[", "-").replace("]", ""))
        dataset = fo.Dataset(names[-1])
        dataset.add_samples(
            fo.Sample(filepath=f"{index}.png", **dict(zip(fields, values)))
            for index, values in enumerate(zip(*fields.values()))
        )
        return dataset

    yield make
    for name in names:
        fo.delete_dataset(name)


@pytest.fixture()
def pair(fo, make_dataset_of):
    """Return a function that creates two samples; the prediction covers half of each ground-truth mask."""
    ground_truth, predicted = np.zeros((2, 4, 4), np.uint8)
    ground_truth[:2], predicted[:1] = 255, 255

    def make(**fields):
        labels = {"ground_truth": ground_truth, "concept": predicted}
        labels = {name: [fo.Segmentation(mask=mask) for _ in range(2)] for name, mask in labels.items()}
        return make_dataset_of(**labels, **fields)

    return make


def giou(results):
    return pytest.approx(results.custom_metrics["conceptseg_giou"]["value"])


def assert_both_raise(dataset, fault, **settings):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    settings = {"pred_field": "concept", "gt_field": "ground_truth"} | settings
    with pytest.raises(ValueError, match=fault):
        evaluate_concepts(dataset, **settings)
    with pytest.raises(ValueError, match=fault):
        dataset.evaluate_segmentations(method="conceptseg", **settings)


def voc(border=True):
    """Return class indices as in PASCAL VOC: a person (15), a chair (9), and a border of 255."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:4], mask[6:] = 15, 9
    if border:
        mask[4] = 255
    return mask


@pytest.mark.parametrize(
    "ground_truth",
    [
        np.where(voc() == 9, 0, voc()),  # one class and its border
        voc(border=False),
        voc(),
        voc().astype(int),
        np.repeat(voc(border=False)[..., None], 3, axis=2),
        np.stack([voc(border=False), voc(border=False), np.zeros((8, 8), np.uint8)], axis=2),
    ],
    ids=["border", "classes", "all", "int", "gray", "colors"],
)
def test_several_classes_without_gt_class_are_not_scored(fo, make_dataset_of, ground_truth):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    plain = np.where(voc() == 15, 255, 0).astype(np.uint8)
    ground_truths = [fo.Segmentation(mask=mask) for mask in (ground_truth, plain)]
    dataset = make_dataset_of(
        ground_truth=ground_truths, concept=[fo.Segmentation(mask=plain), fo.Segmentation(mask=plain)]
    )
    results = evaluate_concepts(dataset, eval_key="run")
    [(sample_id, fault)] = results.backend.unscored.items()
    assert sample_id == dataset.first().id and "class" in fault and "gt_class" in fault
    assert giou(results) == 100 and dataset.values("run_iou") == [None, 1]
    assert_both_raise(dataset[:1], "no sample with a mask in 'ground_truth' can be scored: mask ")


@pytest.mark.parametrize("on_disk", [False, True])
def test_gt_class_selects_one_class(fo, make_dataset_of, tmp_path, on_disk):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    predicted = np.where(voc() == 15, 255, 0).astype(np.uint8)
    predicted[4] = 255  # the border is ignored
    image = Image.fromarray(voc()).convert("P")
    image.putpalette([(37 * value) % 256 for value in range(768)])
    image.putdata(voc().ravel().tolist())
    image.save(tmp_path / "voc.png")
    ground_truth = {"mask_path": str(tmp_path / "voc.png")} if on_disk else {"mask": voc()}
    dataset = make_dataset_of(
        ground_truth=[fo.Segmentation(**ground_truth)], concept=[fo.Segmentation(mask=predicted)]
    )
    assert giou(evaluate_concepts(dataset, gt_class=15)) == 100
    assert giou(evaluate_concepts(dataset, gt_class=9)) == 0
    theirs = dataset.evaluate_segmentations(
        "concept", gt_field="ground_truth", method="conceptseg", gt_class=15
    )
    assert giou(theirs) == 100
    assert_both_raise(dataset, r"several classes \(pixel values 9, 15, 255\)")
    dataset.mask_targets = {"ground_truth": {0: "background", 9: "chair", 15: "person"}}
    assert_both_raise(dataset, r"'ground_truth' has several classes \(9 'chair', 15 'person'\)")


def test_a_single_foreground_is_scored_in_any_encoding(fo, make_dataset_of, tmp_path):
    """Soft edges, 0 and 1, booleans, gray values in color channels or in a palette."""
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    predicted = np.zeros((16, 16), np.uint8)
    predicted[:8] = 255
    soft = predicted.copy()
    soft[7], soft[8] = np.arange(140, 156), np.arange(10, 26)
    Image.fromarray(soft).convert("RGB").quantize(16).save(tmp_path / "soft.gif")  # palette of gray values
    ground_truths = [soft, predicted // 255, predicted > 0, np.repeat(predicted[..., None], 3, axis=2)]
    ground_truths = [fo.Segmentation(mask=mask) for mask in ground_truths]
    ground_truths.append(fo.Segmentation(mask_path=str(tmp_path / "soft.gif")))
    dataset = make_dataset_of(
        ground_truth=ground_truths,
        concept=[fo.Segmentation(mask=predicted) for _ in ground_truths],
    )
    results = evaluate_concepts(dataset)
    assert giou(results) == 100 and not results.backend.unscored


def test_the_form_has_a_dropdown_of_classes(fo, make_dataset_of, run_operator):
    from fiftyone.operators.executor import ExecutionContext
    from fiftyone.operators.registry import OperatorRegistry

    predicted = np.where(voc() == 15, 255, 0).astype(np.uint8)
    dataset = make_dataset_of(
        ground_truth=[fo.Segmentation(mask=voc())], concept=[fo.Segmentation(mask=predicted)]
    )

    def form(**params):
        context = ExecutionContext({"dataset_name": dataset.name, "params": params})
        operator = OperatorRegistry().get_operator(f"{PLUGIN}/evaluate_concepts")
        return operator.resolve_input(context).type.properties

    assert type(form()["gt_class"].type).__name__ == "Number"
    assert run_operator("evaluate_concepts", dataset, {"gt_class": 15}).result["metrics"]["giou"] == 100
    dataset.mask_targets = {"ground_truth": {9: "chair", 15: "person"}}
    assert form()["gt_class"].type.values == [9, 15]
    assert form()["class_missing"].invalid and "class_missing" not in form(gt_class=15)
    assert run_operator("evaluate_concepts", dataset, {"gt_class": 15}).result["metrics"]["giou"] == 100


def test_ignored_pixels_are_equal_in_both_functions(fo, pair):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    ignore = np.zeros((4, 4), np.uint8)
    ignore[1] = 255  # the pixels that were not predicted
    dataset = pair(ignore=[fo.Segmentation(mask=ignore), None])
    for settings, expected in (({}, 75), ({"ignore_field": None}, 50)):
        theirs = dataset.evaluate_segmentations(
            "concept", gt_field="ground_truth", method="conceptseg", **settings
        )
        assert giou(theirs) == expected
        assert giou(evaluate_concepts(dataset, **settings)) == expected
    assert_both_raise(dataset, "field 'nothing' is not in the dataset", ignore_field="nothing")


def test_an_ignore_field_without_masks_is_not_used(pair):
    """A user may have a boolean field with the same name."""
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    dataset = pair(ignore=[True, False], flags=[True, False])
    assert giou(evaluate_concepts(dataset)) == 50
    assert_both_raise(dataset, "field 'flags' holds no Segmentation", ignore_field="flags")


def test_hidden_fields_raise(fo, pair):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts
    from conceptseg_hf.integrations.fiftyone.evaluation import report_of

    ignore = [fo.Segmentation(mask=np.full((4, 4), 255, np.uint8)), None]
    dataset = pair(ignore=ignore, mine_iou=[0.1, 0.2])
    view = dataset.select_fields(["concept", "ground_truth"])
    for hiding, name in ((view, "ignore"), (dataset.exclude_fields("concept"), "concept")):
        with pytest.raises(ValueError, match=f"field '{name}' is hidden by the view"):
            evaluate_concepts(hiding)
    with pytest.raises(ValueError, match="field 'mine_iou' already exists"):
        evaluate_concepts(view, eval_key="mine", ignore_field=None)
    evaluate_concepts(view, eval_key="run", ignore_field=None)
    assert report_of(view[:1], "run").table[-1]["samples"] == 1


def test_user_fields_are_not_replaced(pair):
    """This applies to new runs and to further metrics of a stored run."""
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    dataset = pair(m_f_w=[1.0, 2.0])
    evaluate_concepts(dataset, eval_key="m")
    with pytest.raises(ValueError, match="field 'm_f_w' already exists"):
        evaluate_concepts(dataset, eval_key="m", metrics=("giou", "f_w"))
    evaluate_concepts(dataset, eval_key="m")
    assert dataset.values("m_f_w") == [1.0, 2.0]
    assert_both_raise(dataset, "'concept' is used both for predictions and ground truth", gt_field="concept")


def test_a_fully_ignored_sample_is_not_reported_as_replaced(fo, pair):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts
    from conceptseg_hf.integrations.fiftyone.evaluation import replaced_since

    dataset = pair(ignore=[fo.Segmentation(mask=np.full((4, 4), 255, np.uint8)), None])
    results = evaluate_concepts(dataset, eval_key="run")
    assert replaced_since(dataset, "run") == []
    assert results.metrics()["recall"] == 0.5 and results.report()
    results = evaluate_concepts(dataset[:1], eval_key="run")
    assert results.metrics()["recall"] == 0


@pytest.mark.parametrize("function", ["evaluate_concepts", "evaluate_segmentations"])
def test_a_stored_run_is_kept_if_files_are_missing(fo, pair, tmp_path, function):
    """For example, if the disk with the ground-truth masks is not mounted."""
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    dataset = pair()
    stored = evaluate_concepts(dataset, eval_key="run").custom_metrics
    for sample in dataset:
        sample["ground_truth"] = fo.Segmentation(mask_path=str(tmp_path / "missing.png"))
        sample.save()
    fault = "no sample with a mask in 'ground_truth' can be scored: .*missing.png"
    with pytest.raises(ValueError, match=fault):
        if function == "evaluate_concepts":
            evaluate_concepts(dataset, eval_key="run")
        else:
            dataset.evaluate_segmentations(
                "concept", gt_field="ground_truth", eval_key="run", method="conceptseg"
            )
    dataset.reload()
    assert dataset.load_evaluation_results("run", cache=False).custom_metrics == stored
    assert dataset.values("run_iou") == [0.5, 0.5]


def test_an_interrupt_deletes_the_partial_run(pair, monkeypatch):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts, evaluation

    def interrupted(*arguments):
        raise KeyboardInterrupt

    dataset = pair()
    monkeypatch.setattr(evaluation, "_fraction_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_concepts(dataset, eval_key="run")
    assert dataset.list_evaluations() == [] and not dataset.has_field("run_iou")


@pytest.fixture()
def explore(open_explorer):
    """Return a function that returns the Concept explorer's state, and the view after a click on a row of metrics."""

    def load(dataset, row=None):
        explorer, context = open_explorer(dataset)
        if row is not None:
            context.params["row"] = row
            explorer.show_group(context)
        return context.panel.state, *context.shown

    return load


def test_an_unfinished_run_is_reported(fo, pair, explore, monkeypatch):
    from conceptseg_hf.integrations.fiftyone import declare_prediction_fields, evaluate_concepts, evaluation

    def killed(*arguments):
        raise RuntimeError("killed")

    dataset = pair()
    declare_prediction_fields(dataset, "concept")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(evaluation, "_fraction_of", killed)
        dataset.evaluate_segmentations(
            "concept", gt_field="ground_truth", eval_key="run", method="conceptseg"
        )
    assert dataset.list_evaluations() == ["run"]
    for function in (evaluation.report_of, evaluation.replaced_since):
        with pytest.raises(ValueError, match="evaluation 'run' is not finished"):
            function(dataset, "run")
    [state] = explore(dataset)
    assert state["status"] == "ready" and "Evaluation 'run' is not finished" in state["summary"]
    assert state["metrics"] == [] and state["rule_count"] == 0
    evaluate_concepts(dataset, eval_key="run")
    [state] = explore(dataset)
    assert len(state["metrics"]) == 3


@pytest.mark.parametrize("levels", [[None, None], [3, 4], ["", "?"], ["CI", None]])
def test_rows_without_a_level_show_their_samples(pair, explore, levels):
    from conceptseg_hf.integrations.fiftyone import declare_prediction_fields, evaluate_concepts

    dataset = pair(level=levels)
    declare_prediction_fields(dataset, "concept")
    evaluate_concepts(dataset, eval_key="run")
    [state] = explore(dataset)
    for index, row in enumerate(state["metrics"]):
        _, view = explore(dataset, index)
        assert len(view) == row["samples"]


def test_a_user_field_present_is_ignored_without_a_benchmark(pair):
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts
    from conceptseg_hf.integrations.fiftyone.evaluation import report_of

    dataset = pair(present=[False, False])
    evaluate_concepts(dataset, eval_key="run")
    assert [record["present"] for record in report_of(dataset, "run").records] == [True, True]
    dataset.set_values("benchmark", ["concept-shapes"] * 2)
    assert [record["present"] for record in report_of(dataset, "run").records] == [False, False]


def test_the_operator_has_default_parameters(pair, run_operator):
    dataset = pair()
    for _ in range(2):
        assert run_operator("evaluate_concepts", dataset, {"eval_key": "concepts"}).result["table"]


def test_heatmaps_are_scaled_by_their_range(fo, pair, tmp_path):
    """A heatmap has the same score in the database and on disk, for any range."""
    from conceptseg_hf.integrations.fiftyone import evaluate_concepts

    map_ = np.full((4, 4), 0.2)
    map_[:1] = 0.8
    eight, sixteen = np.rint(map_ * 255).astype(np.uint8), np.rint(map_ * 65535).astype(np.uint16)
    Image.fromarray(eight).save(tmp_path / "8.png")
    Image.fromarray(sixteen).save(tmp_path / "16.png")
    expected = 100 * (4 * 0.2 + 4 * 0.8 + 8 * 0.2) / 16  # predicted, missed, background
    for heatmap in (
        {"map": map_},
        {"map": map_ * 6 - 3, "range": [-3, 3]},
        {"map": eight},
        {"map": sixteen},
        {"map": np.rint(map_ * 100).astype(np.uint8), "range": [0, 100]},
        {"map_path": str(tmp_path / "8.png")},
        {"map_path": str(tmp_path / "8.png"), "range": [0, 255]},
        {"map_path": str(tmp_path / "16.png")},
    ):
        dataset = pair(heat=[fo.Heatmap(**heatmap) for _ in range(2)])
        results = evaluate_concepts(dataset, heatmap_field="heat", metrics=("mae",))
        assert results.custom_metrics["conceptseg_mae"]["value"] == pytest.approx(expected, abs=0.01), heatmap


def test_masks_that_cannot_be_compared_are_errors(fo, pair, tmp_path):
    from conceptseg_hf.integrations.fiftyone import declare_prediction_fields, find_uncertain
    from conceptseg_hf.integrations.fiftyone.uncertainty import TAGS

    small = fo.Segmentation(mask=np.zeros((2, 2), np.uint8))
    missing = fo.Segmentation(mask_path=str(tmp_path / "gone.png"))
    dataset = pair(other=[small, missing])
    for field in ("concept", "other"):
        declare_prediction_fields(dataset, field)
    found = find_uncertain(dataset, other_field="other")
    assert found["error"] == dataset.values("id") and found["routes"] == []
    assert dataset.count_sample_tags() == {TAGS["error"]: 2}

    # A search in a view removes the tags in the whole dataset.
    find_uncertain(dataset[:1])
    assert dataset.count_sample_tags() == {}


def test_find_uncertain_checks_the_field_before_segmenting(fo, make_dataset_of, run_operator, monkeypatch):
    """Routes cannot be compared without masks, so nothing is segmented."""
    import conceptseg_hf.integrations.fiftyone as package

    dataset = make_dataset_of(objects=[fo.Detections()])
    package.declare_prediction_fields(dataset, "objects", ["detections"])
    calls = []
    monkeypatch.setattr(package, "segment_other_route", lambda *arguments: calls.append(arguments) or [])
    with pytest.raises(Exception, match="'objects' holds no Segmentation"):
        run_operator("find_uncertain", dataset, {"field": "objects", "other_route": True})
    assert calls == []
