"""Tests of the operators and forms for concepts, and of the panel of the concept library."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conceptseg_hf import ConceptPrompt

PLUGIN = "@conceptseg/conceptseg"

pytestmark = pytest.mark.slow


@pytest.fixture()
def outputs_of(fo):
    """Return a function that runs an operator like the App and returns the last output in the dialog."""
    from fiftyone.operators.executor import ExecutionContext, Executor
    from fiftyone.operators.registry import OperatorRegistry

    def execute(name, dataset, params, **context):
        operator = OperatorRegistry().get_operator(f"{PLUGIN}/{name}")
        request = {"dataset_name": dataset.name, "params": params, **context}
        messages = operator.execute(ExecutionContext(request, executor=Executor()))
        shown = [m.body.params for m in messages if m.body.operator_uri.endswith("show_output")]
        labels = [
            [field["view"].get("label") for field in output["outputs"]["type"]["properties"].values()]
            for output in shown
        ]
        return shown[-1]["results"], labels

    return execute


def test_induce_form_shows_invalid_values(shadows, ids, messages, form_of):
    bare = shadows[ids[1]]
    bare["ground_truth"] = None
    bare.save()

    def ask(selected=(), **params):
        return messages("induce_concept", shadows, params, selected=list(selected))

    assert ask() == ["Prompt is empty; describe the concept in a few words."]
    assert ask(prompt="shadow") == [
        "There are no references; select samples in which the concept is marked by masks or boxes."
    ]
    assert ask(ids[:1], prompt="shadow") == []
    form = form_of("induce_concept", shadows, {"prompt": "shadow"}, selected=ids[:1])
    assert form["summary"].view.label == (
        "The concept 'shadow' will be induced from 1 samples, in which 'ground_truth' marks it."
    )
    [unmarked] = ask(ids[:2], prompt="shadow")
    assert unmarked.startswith(f"Reference '{bare.filename}' has no box or mask in 'ground_truth'; add one")
    [checkpoint] = ask(ids[:1], prompt="shadow", checkpoint="nowhere")
    assert checkpoint.startswith("Checkpoint 'nowhere' was not found")
    [view] = ask(ids[:1], prompt="shadow", negatives="nothing")
    assert view.startswith("Saved view 'nothing' is not in the dataset")


def test_forms_show_missing_foreign_and_damaged_concepts(shadows, ids, induced, messages, form_of, tmp_path):
    from conceptseg_hf.integrations.fiftyone import StoredConcept, delete_concept, save_concept

    [taken] = messages("induce_concept", shadows, {"prompt": "shadow"}, selected=ids[:1])
    assert taken.startswith("A concept 'shadow' is already in the library of this dataset; use another name")
    for operator in ("apply_concept", "edit_concept"):
        assert messages(operator, shadows) == []
        assert messages(operator, shadows, {"concept": "moon"}) != []
    foreign = replace(induced, name="foreign", concept=replace(induced.concept, model_hash="0" * 16))
    save_concept(shadows, foreign)
    for operator in ("apply_concept", "edit_concept"):
        [message] = messages(operator, shadows, {"concept": "foreign"})
        assert "the concept 'shadow' was made with other weights of SAM 3 or the CTM" in message
    save_concept(shadows, StoredConcept("imported", induced.concept))
    assert messages("apply_concept", shadows, {"concept": "imported"}) == []
    [message] = messages("edit_concept", shadows, {"concept": "imported"})
    assert message.startswith("Concept 'imported' has no references in this dataset; select samples")
    assert (
        messages("edit_concept", shadows, {"concept": "imported", "use_selected": True}, selected=ids[:2])
        == []
    )
    [field] = messages("apply_concept", shadows, {"concept": "shadow", "field": "ground_truth"})
    assert "holds labels that ConceptSeg did not create there" in field
    summary = form_of("apply_concept", shadows, {"concept": "shadow"})["summary"].view.label
    assert summary.startswith("7 samples will be segmented")
    without = form_of("apply_concept", shadows, {"concept": "shadow", "use_references": False})
    assert without["summary"].view.label.startswith("10 samples will be segmented")

    def ask(**params):
        return messages("manage_concepts", shadows, params)

    missing, text = str(tmp_path / "none.safetensors"), tmp_path / "text.safetensors"
    text.write_text("concept")
    assert ask(action="import", path=missing)[0] == (
        f"Concept '{missing}' is not a file; give a file of `conceptseg induce`."
    )
    assert "is not a concept" in ask(action="import", path=str(text))[0]
    other = foreign.concept.save(tmp_path / "foreign.safetensors")
    assert "made with other weights" in ask(action="import", path=str(other), new_name="x")[0]
    assert ask(action="import") == ["File is empty; enter a path that ends in .safetensors."]
    assert "already in the library" in ask(action="rename", concept="foreign", new_name="shadow")[0]
    assert "is invalid" in ask(action="rename")[0] and ask(action="delete") == []
    assert "does not end in .safetensors" in ask(action="export", path="x.pt")[0]
    for name in ("shadow", "foreign", "imported"):
        delete_concept(shadows, name)
    for operator in ("apply_concept", "edit_concept"):
        [message] = messages(operator, shadows)
        assert message.startswith("The library of this dataset has no concepts; run induce_concept")


def test_induce_and_edit_show_how_well_references_are_explained(shadows, ids, outputs_of):
    from conceptseg_hf.integrations.fiftyone import load_concept, reference_scores

    shown, labels = outputs_of("induce_concept", shadows, {"prompt": "shadow"}, selected=ids[:3])
    assert [row[0] for row in labels[:-1]] == [f"{done} of 6 completions" for done in range(7)]
    stored = load_concept(shadows, "shadow")
    assert stored.concept.summary() in labels[-1] and "Apply this concept" in labels[-1]
    assert (shown["rule"], shown["phrases"]) == (stored.concept.rule, "shadow")
    assert [float(row["iou"]) for row in shown["references"]] == pytest.approx(
        [row["iou"] for row in reference_scores(shadows, stored)], abs=0.005
    )
    assert [row["name"] for row in shown["candidates"]] == [row.name for row in stored.concept.scores]

    outputs_of("apply_concept", shadows, {"field": "found", "router": "sam_only"})
    shown, labels = outputs_of("edit_concept", shadows, {"concept": "shadow", "phrases": "star | circle"})
    edited = load_concept(shadows, "shadow").concept
    assert edited.phrases == ("star", "circle") and edited.rule == stored.concept.rule
    assert any("fits worst" in label for label in labels[-1] if label)
    assert "Run again with this concept" in labels[-1] and shown["phrases"] == "star | circle"


def test_operators_can_be_called_from_python_and_scheduled(
    shadows, ids, induced, run_operator, run_queued, tmp_path
):
    from conceptseg_hf.integrations.fiftyone import concept_names, load_concept

    run_operator("apply_concept", shadows, {"concept": "shadow"})
    run_operator("apply_concept", shadows, {"concept": "shadow", "field": "later"}, request_delegation=True)
    edit = {"concept": "shadow", "rule": "find the star"}
    run_operator("edit_concept", shadows, edit, request_delegation=True)
    params = {"prompt": "shadow", "name": "again"}
    run_operator("induce_concept", shadows, params, selected=ids[:2], request_delegation=True)
    shadows.reload()
    assert shadows.count("shadow") == 7 and not shadows.has_field("later")
    run_queued(shadows)
    shadows.reload()
    assert shadows.values("later.route") == shadows.values("shadow.route")
    assert load_concept(shadows, "shadow").concept.rule == "find the star"
    assert load_concept(shadows, "again").reference_ids == tuple(ids[:2])
    path = tmp_path / "s.safetensors"
    for params, message in (
        ({"action": "export", "concept": "shadow", "path": str(path)}, f"'shadow' was written to {path}."),
        ({"action": "rename", "concept": "shadow", "new_name": "dark"}, "'shadow' is now called 'dark'."),
        ({"action": "import", "path": str(path)}, "'shadow' was imported."),
        ({"action": "delete", "concept": "dark"}, "'dark' was deleted; its predictions are kept."),
    ):
        result = run_operator("manage_concepts", shadows, params).result
        assert result == {"message": f"The concept {message}"}
    assert concept_names(shadows) == ["again", "shadow"] and ConceptPrompt.load(path).rule == "find the star"
    for name, message in (
        ("moon", "oncept 'moon' is not in the library"),
        (None, "no concept is given; use one of 'again', 'sh"),
    ):
        with pytest.raises(Exception, match=message):
            run_operator("apply_concept", shadows, {"concept": name})


def test_explorer_shows_the_route_of_concepts(shadows, induced, run_operator):
    import sys

    from conceptseg_hf.integrations.fiftyone import concept_job, segment_collection

    for _ in segment_collection(shadows, concept_job(shadows, "shadow")):
        pass
    from fiftyone.operators.registry import OperatorRegistry

    panel = OperatorRegistry().get_operator(f"{PLUGIN}/concept_explorer")
    explorer = sys.modules[type(panel).__module__]
    [bars] = explorer._routes_plot(shadows, "shadow")
    assert dict(zip(bars["x"], bars["y"])) == shadows.exists("shadow").count_values("shadow.route")
    assert "concept" in bars["x"]


def test_library_panel_lists_damaged_concepts(shadows, induced):
    """A damaged concept, such as that of an edited export, does not hide the others."""
    from fiftyone.operators.executor import ExecutionContext, Executor
    from fiftyone.operators.registry import OperatorRegistry

    from conceptseg_hf.integrations.fiftyone import rename_concept, save_concept

    save_concept(shadows, replace(induced, name="damaged"))
    key = max(shadows.list_runs(), key=lambda key: shadows.get_run_info(key).config.name == "damaged")
    config = shadows.get_run_info(key).config
    config.file = "no file"
    shadows.update_run_config(key, config)
    panel = OperatorRegistry().get_operator(f"{PLUGIN}/concept_library")
    params = {"panel_id": "panel", "panel_state": {}}
    request = {"dataset_name": shadows.name, "params": params}
    context = ExecutionContext(request, executor=Executor())
    panel.refresh(context)
    state = context.panel.get_state
    assert state("status") == "**Concepts stored with the dataset: 2**" and state("name") == "damaged"
    damaged, good = state("concepts")
    assert (
        damaged["phrases"].startswith("concept 'damaged' is damaged; delete it") and damaged["score"] == "-"
    )
    assert good == {"name": "shadow", "phrases": "shadow", "score": f"{induced.concept.score:.2f}"}
    assert state("summary") == "Concept 'damaged' is damaged; delete it, and induce or import it again."
    context.panel.set_state("name", "shadow")
    panel.refresh(context)
    assert (
        state("summary")
        == f"shadow: 'shadow' explains the references with a mean IoU of {induced.concept.score:.2f}."
    )
    assert [row["iou"] for row in state("references")] == [
        f"{iou:.2f}" for iou in induced.concept.scores[0].per_reference
    ]
    assert {"summary_shown", "rule", "references"} <= set(panel.render(context).type.properties)
    rename_concept(shadows, "shadow", "dark")
    panel.refresh(context)
    assert state("name") == "damaged"
