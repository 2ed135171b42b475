"""What the plugin registers, and what its forms say."""

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
}


@pytest.fixture()
def messages(fo):
    """The warnings that a form shows for some values; all of them keep it from being sent."""
    from fiftyone.operators import types
    from fiftyone.operators.executor import ExecutionContext
    from fiftyone.operators.registry import OperatorRegistry

    def ask(operator: str, dataset, params=None, **context):
        request = {"dataset_name": dataset.name, "params": params or {}, **context}
        form = (
            OperatorRegistry().get_operator(f"{PLUGIN}/{operator}").resolve_input(ExecutionContext(request))
        )
        return [
            field.view.label
            for field in form.type.properties.values()
            if isinstance(field.view, types.Warning) and field.invalid
        ]

    return ask


def test_everything_is_registered(fo):
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


def test_the_form_says_what_is_missing(fo, make_dataset, messages):
    dataset = make_dataset(3)
    target = dataset.match({"role": "target"}).first().id
    reference = dataset.match({"role": "reference"}).first().id

    def ask(context=None, **params):
        return messages("segment_concept", dataset, params, **(context or {}))

    assert ask(prompt="star") == []
    assert ask() == ["There is no prompt; give words, or the field that holds them."]
    assert ask(prompt="  ") == ["There is no prompt; give words, or the field that holds them."]
    assert ask(prompt_source="field", prompt_field="nothing") == [
        "Prompt field 'nothing' is not in the dataset; give one of its fields."
    ]
    assert ask(prompt="star", checkpoint="nowhere") == [
        "Checkpoint 'nowhere' was not found; give 'nano', a folder, or a hub id such as owner/name."
    ]
    [folder] = ask(prompt="star", checkpoint=str(ROOT / "tests"))
    assert "is a folder without config.json" in folder
    assert ask(prompt="star", references="selected") == [
        "No samples are selected; select the references in the grid."
    ]
    assert ask({"selected": [reference]}, prompt="star") == []
    assert ask({"selected": [target]}, prompt="star") == []  # a mask marks it, where a box marks others
    [unmarked] = ask({"selected": [target]}, prompt="star", reference_label_field="ref_boxes")
    assert "has neither box nor mask in 'ref_boxes'" in unmarked
    assert ask({"selected": [target]}, prompt="star", reference_label_field="ground_truth") == []
    assert ask({"selected": [target]}, prompt="star", reference_label_field="none") == []
    [view] = ask(prompt="star", references="saved_view", saved_view="nothing")
    assert "saved view 'nothing' is not in the dataset" in view.lower()
    nothing = "There is nothing to segment: the view is empty, or all its samples are done."
    assert ask({"view": dataset.match({"level": "none"})._serialize()}, prompt="star") == [nothing]
    [field] = ask(prompt="star", field="no name")
    assert "cannot be a field's name" in field
    [outputs] = ask(prompt="star", segmentation=False)
    assert "give segmentation, detections or both" in outputs


def test_other_forms_say_what_is_missing(fo, make_dataset, messages, tmp_path):
    dataset = make_dataset(2)
    bare = fo.Dataset("bare")
    try:
        assert messages("find_uncertain", bare) == ["There are no predictions; run segment_concept first."]
        assert "No field has masks; run segment_concept first." in messages("evaluate_concepts", bare)
        assert "have no field reference_ids" in messages("show_references", bare)[0]
    finally:
        fo.delete_dataset("bare")
    assert messages("show_references", dataset) == [
        "No sample is selected or open; select the targets in the grid."
    ]
    assert messages("evaluate_concepts", dataset, {"eval_key": "no name"}) == [
        "'no name' cannot be a run's name; use letters, digits and underscores."
    ]
    assert messages("load_concept_benchmark", dataset, {"benchmark": "DUTS"}) == []
    [fault] = messages("load_concept_benchmark", dataset, {"benchmark": "DUTS", "root": str(tmp_path / "no")})
    assert "is not a folder" in fault


def test_a_missing_package_is_said_in_every_form(fo):
    """In a process where `conceptseg_hf` cannot be imported."""
    code = """
import sys
sys.modules["conceptseg_hf"] = None
import fiftyone as fo
from fiftyone.operators.executor import ExecutionContext
from fiftyone.operators.registry import OperatorRegistry
registry = OperatorRegistry()
assert registry.list_errors() == []
for name in ("segment_concept", "evaluate_concepts", "load_concept_benchmark", "find_uncertain"):
    operator = registry.get_operator("@conceptseg/conceptseg/" + name)
    [shown] = operator.resolve_input(ExecutionContext({"params": {}})).type.properties.values()
    assert shown.invalid, name
    print(shown.view.label)
"""
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("pip install 'conceptseg-hf[fiftyone]'" in line for line in lines)


def test_errors_reach_python_as_one_sentence(fo, make_dataset, run_operator):
    dataset = make_dataset(2)
    with pytest.raises(Exception, match="There is no prompt; give words"):
        run_operator("segment_concept", dataset, {"prompt": ""})


def test_references_stand_beside_targets(fo, make_dataset, run_operator):
    dataset = make_dataset(3)
    target = dataset.match({"role": "target"}).exists("reference_ids").last()
    result = run_operator("show_references", dataset, selected=[target.id])
    assert result.error is None


def test_a_view_that_hides_fields_changes_nothing(fo, make_dataset, run_operator):
    """Neither which samples are references, nor what marks the concept in them."""
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


def test_a_benchmark_is_not_mixed_into_other_samples(fo, run_operator):
    other = fo.Dataset("someone_elses")
    try:
        other.add_sample(fo.Sample(filepath="nothing.png"))
        with pytest.raises(
            Exception, match="dataset 'someone_elses' is there already and holds other samples"
        ):
            run_operator("load_concept_benchmark", None, {"dataset_name": "someone_elses", "limit": 2})
        assert len(other) == 1
    finally:
        fo.delete_dataset("someone_elses")
