"""Tests of the plugin's operators and forms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "@conceptseg/conceptseg"
OPERATORS = {
    *("segment_concept", "evaluate_concepts", "load_concept_benchmark", "find_uncertain"),
    *("show_references", "cancel_run", "release_model", "concept_explorer"),
    *("induce_concept", "apply_concept", "edit_concept", "manage_concepts", "concept_library"),
}


def test_all_operators_and_icons_are_registered(fo):
    from fiftyone.operators.registry import OperatorRegistry

    registry = OperatorRegistry()
    assert registry.list_errors() == []
    assert {
        operator.name for operator in registry.list_operators() if operator.plugin_name == PLUGIN
    } == OPERATORS
    definition = yaml.safe_load((ROOT / "fiftyone_plugin" / "fiftyone.yml").read_text(encoding="utf-8"))
    assert {*definition["operators"], *definition["panels"]} == OPERATORS
    for operator in registry.list_operators():
        if operator.plugin_name == PLUGIN:
            for icon in (operator.config.light_icon, operator.config.dark_icon):
                assert (ROOT / "fiftyone_plugin" / icon.lstrip("/")).is_file()


def test_segment_form_shows_missing_and_invalid_values(fo, make_dataset, messages):
    dataset = make_dataset(3)
    target = dataset.match({"role": "target"}).first().id
    reference = dataset.match({"role": "reference"}).first().id

    def ask(context=None, **params):
        return messages("segment_concept", dataset, params, **(context or {}))

    assert ask(prompt="star") == []
    assert ask() == ["Prompt is empty; enter a prompt, or choose the field that contains the prompts."]
    assert ask(prompt="  ") == [
        "Prompt is empty; enter a prompt, or choose the field that contains the prompts."
    ]
    assert ask(prompt_source="field", prompt_field="nothing") == [
        "Prompt field 'nothing' is not in the dataset; use one of its fields."
    ]
    assert ask(prompt="star", checkpoint="nowhere") == [
        "Checkpoint 'nowhere' was not found; use 'nano', a folder, or a hub id such as owner/name."
    ]
    [folder] = ask(prompt="star", checkpoint=str(ROOT / "tests"))
    assert "is a folder without config.json" in folder
    assert ask(prompt="star", references="selected") == [
        "No sample is selected; select references in the grid."
    ]
    assert ask({"selected": [reference]}, prompt="star") == []
    assert ask({"selected": [target]}, prompt="star") == []  # marked by a mask
    [unmarked] = ask({"selected": [target]}, prompt="star", reference_label_field="ref_boxes")
    assert "has no box or mask in 'ref_boxes'" in unmarked
    assert ask({"selected": [target]}, prompt="star", reference_label_field="ground_truth") == []
    assert ask({"selected": [target]}, prompt="star", reference_label_field="none") == []
    [view] = ask(prompt="star", references="saved_view", saved_view="nothing")
    assert "saved view 'nothing' is not in the dataset" in view.lower()
    [empty] = ask({"view": dataset.match({"level": "none"})._serialize()}, prompt="star")
    assert empty.startswith("No samples to segment: the view is empty")
    [field] = ask(prompt="star", field="no name")
    assert "Field name 'no name' is invalid" in field
    [outputs] = ask(prompt="star", segmentation=False)
    assert "use segmentation, detections or both" in outputs


def test_other_forms_show_missing_and_invalid_values(fo, make_dataset, messages, tmp_path):
    dataset = make_dataset(2)
    bare = fo.Dataset("bare")
    try:
        assert messages("find_uncertain", bare) == [
            "The dataset has no predictions; run segment_concept first."
        ]
        assert "The dataset has no field with masks; run segment_concept first." in messages(
            "evaluate_concepts", bare
        )
        assert "has no field reference_ids" in messages("show_references", bare)[0]
    finally:
        fo.delete_dataset("bare")
    assert messages("show_references", dataset) == [
        "No sample is selected or open; select targets in the grid."
    ]
    assert messages("evaluate_concepts", dataset, {"eval_key": "no name"}) == [
        "Run name 'no name' is invalid; use letters, digits and underscores."
    ]
    assert messages("load_concept_benchmark", dataset, {"benchmark": "DUTS"}) == []
    [fault] = messages("load_concept_benchmark", dataset, {"benchmark": "DUTS", "root": str(tmp_path / "no")})
    assert "is not a folder" in fault


def test_all_forms_show_that_the_package_is_missing(fo):
    """The forms are created in a process that cannot import `conceptseg_hf`."""
    code = """
import sys
sys.modules["conceptseg_hf"] = None
import fiftyone as fo
from fiftyone.operators.executor import ExecutionContext
from fiftyone.operators.registry import OperatorRegistry
registry = OperatorRegistry()
assert registry.list_errors() == []
for name in (
    *("segment_concept", "evaluate_concepts", "load_concept_benchmark", "find_uncertain"),
    *("induce_concept", "apply_concept", "edit_concept", "manage_concepts"),
):
    operator = registry.get_operator("@conceptseg/conceptseg/" + name)
    [shown] = operator.resolve_input(ExecutionContext({"params": {}})).type.properties.values()
    assert shown.invalid, name
    print(shown.view.label)
"""
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all("pip install 'conceptseg-hf[fiftyone]'" in line for line in lines)


def test_operator_errors_are_raised_in_python(fo, make_dataset, run_operator):
    dataset = make_dataset(2)
    with pytest.raises(Exception, match="Prompt is empty; enter a prompt"):
        run_operator("segment_concept", dataset, {"prompt": ""})


def test_show_references(fo, make_dataset, run_operator):
    dataset = make_dataset(3)
    target = dataset.match({"role": "target"}).exists("reference_ids").last()
    result = run_operator("show_references", dataset, selected=[target.id])
    assert result.error is None


def test_hidden_fields_do_not_affect_the_run(fo, make_dataset, run_operator):
    """The fields `role` and `ref_boxes` are read from the dataset, even if the view hides them."""
    dataset = make_dataset(3)
    view = dataset.exclude_fields(["role", "ref_boxes"])
    run_operator("segment_concept", dataset, {"prompt": "star", "router": "sam_only"}, view=view)
    dataset.reload()
    assert set(dataset.exists("concept").values("role")) == {"target"}


def test_dynamic_groups_are_flattened(fo, make_dataset, run_operator):
    dataset = make_dataset(6)
    view = dataset.load_saved_view("episodes")
    run_operator("segment_concept", dataset, {"prompt": "star", "router": "sam_only"}, view=view)
    dataset.reload()
    assert dataset.count("concept") == 6
    assert run_operator("evaluate_concepts", dataset, {}, view=view).result["table"]


def test_a_benchmark_is_not_loaded_into_a_user_dataset(fo, run_operator):
    other = fo.Dataset("someone_elses")
    try:
        other.add_sample(fo.Sample(filepath="nothing.png"))
        with pytest.raises(Exception, match="dataset 'someone_elses' already exists and holds other samples"):
            run_operator("load_concept_benchmark", None, {"dataset_name": "someone_elses", "limit": 2})
        assert len(other) == 1
    finally:
        fo.delete_dataset("someone_elses")


def test_the_form_shows_the_field_that_marks_the_selection(fo, make_dataset, form_of, run_operator):
    """Another field is used if the most likely one is empty; without any marks, the images are used alone."""
    from conceptseg_hf.integrations.fiftyone import SegmentationJob

    dataset = make_dataset(3)
    target, bare = dataset.match({"role": "target"}).limit(2)
    bare["ground_truth"] = None
    bare.save()
    reference = dataset.exists("ref_boxes").first()

    def automatic_choice(sample):
        form = form_of("segment_concept", dataset, {"prompt": "star"}, selected=[sample.id])
        marks = form["reference_label_field"]
        assert marks.default == "auto" and "fault" not in form
        return marks.view.choices[0].label

    assert automatic_choice(reference) == "Automatic: ref_boxes"
    assert automatic_choice(target) == "Automatic: ground_truth"
    assert automatic_choice(bare) == "Automatic: none (images without marks)"
    params = {"prompt": "star", "router": "sam_only", "reference_label_field": "auto"}
    run_operator("segment_concept", dataset, params, selected=[target.id])
    dataset.reload()
    [key] = dataset.list_runs()
    assert SegmentationJob.load(dataset, key).reference_label_field == "ground_truth"


def test_an_interrupted_run_is_resumed_by_default(make_dataset, form_of, run_operator):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(6)
    job = SegmentationJob(prompt="star", router="sam_only", reference_label_field="ref_boxes", batch_size=2)
    run = segment_collection(dataset.load_saved_view("targets"), job)
    next(run), next(run)

    def form(**params):
        return form_of("segment_concept", dataset, {"prompt": "star", "router": "sam_only"} | params)

    assert "field 'concept' is being written by another run" in form()["in_use"].view.label.lower()
    assert not form()["in_use"].invalid and "in_use" not in form(field="another")
    run.close()
    assert "in_use" not in form()
    assert form()["resume"].default and "skip_existing" not in form()
    assert form()["summary"].view.label.startswith("4 samples will be segmented, 2 are done;")
    assert form(resume=False)["summary"].view.label.startswith("6 samples will be segmented;")
    for other in ({"prompt": "circle"}, {"field": "another"}):
        assert "resume" not in form(**other) and form(**other)["skip_existing"].default is None
    existing = dict(zip(*dataset.exists("concept").values(["id", "concept.id"])))
    run_operator("segment_concept", dataset, {"prompt": "star", "router": "sam_only", "resume": True})
    dataset.reload()
    assert existing.items() <= dict(zip(*dataset.exists("concept").values(["id", "concept.id"]))).items()
    assert dataset.count("concept") == 6 and "resume" not in form()


def test_a_run_can_be_cancelled_by_the_operator(make_dataset, form_of, run_operator):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(4)
    assert form_of("cancel_run", dataset)["none"].view.label == "No run is writing to this dataset."
    assert run_operator("cancel_run", dataset).result == {"cancelled": False}
    job = SegmentationJob(prompt="star", router="sam_only", batch_size=1)
    run = segment_collection(dataset.load_saved_view("targets"), job)
    next(run), next(run)
    [choice] = form_of("cancel_run", dataset)["name"].view.choices
    assert choice.label.startswith("concept: 1 of 4 done, since ")
    assert run_operator("cancel_run", dataset, {"name": "concept"}).result == {"cancelled": True}
    [last] = run
    assert last.cancelled and str(last) == "2 of 4 segmented, cancelled"


def test_evaluate_operator_lists_skipped_samples(fo, make_dataset, run_operator):
    """Each sample is either scored or listed."""
    dataset = make_dataset(5)
    run_operator("segment_concept", dataset, {"prompt": "star", "router": "sam_only"})
    dataset.reload()
    bare, lost = dataset.match({"role": "target"}).limit(2)
    bare["ground_truth"] = None
    lost["ground_truth"].mask_path = "/nowhere/mask.png"
    bare.save()
    lost.save()
    result = run_operator("evaluate_concepts", dataset).result
    assert result["summary"].endswith(f" (3 of {len(dataset)} samples)")
    rows = {row["why"]: (row["samples"], row["files"]) for row in result["left_out"]}
    references = dataset.match({"role": "reference"})
    assert rows.pop("Without a mask in 'ground_truth'") == (1, bare.filename)
    count, files = rows.pop("References without a mask in 'ground_truth'")
    assert (
        count == len(references) and files.startswith(references.first().filename) and files.endswith(", ...")
    )
    [(why, named)] = rows.items()
    assert "'/nowhere/mask.png' is not a file" in why and named == (1, lost.filename)


def test_load_operator_lists_unreadable_samples(fo, tmp_path):
    """A failure replaces the progress in the dialog."""
    from fiftyone.operators.executor import ExecutionContext, Executor
    from fiftyone.operators.registry import OperatorRegistry
    from PIL import Image

    def dialog_labels(params):
        operator = OperatorRegistry().get_operator(f"{PLUGIN}/load_concept_benchmark")
        context = ExecutionContext({"params": params}, executor=Executor())
        labels = []
        try:
            for message in operator.execute(context):
                if message.body.operator_uri.endswith("show_output"):
                    fields = message.body.params["outputs"]["type"]["properties"]
                    labels.append([field["view"].get("label") for field in fields.values()])
        except ValueError as error:
            labels.append(str(error))
        return labels

    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for stem in "ab":
            Image.new("L", (30, 20), 255).save(tmp_path / name / f"{stem}.png")
    (tmp_path / "prompt.txt").write_text("thing")
    (tmp_path / "images" / "b.png").write_bytes(b"not an image")
    params = {"benchmark": "plain", "root": str(tmp_path), "dataset_name": "shown"}
    try:
        start, end, last = dialog_labels(params)
        assert start == ["0 of 2 samples", "Cancel the run"] and end == ["2 of 2 samples"]
        assert last == ["2 of 2 samples; 1 could not be read, see load_error (b.png)"]
        message = "dataset 'shown' already exists and holds other samples; use another dataset_name."
        dataset = fo.load_dataset("shown")
        dataset.info = {}
        dataset.save()
        assert dialog_labels(params) == [[f"Failed: {message}"], message]
    finally:
        fo.delete_dataset("shown")
