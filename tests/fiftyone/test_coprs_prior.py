"""The positional prior of CoPRS as a heatmap in the operator, the model and the panel, with a random checkpoint."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from random_coprs import save_random_coprs


@pytest.fixture(scope="module")
def coprs_checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("coprs")
    save_random_coprs(folder)
    return str(folder)


@pytest.fixture()
def segmented(make_dataset, run_operator, coprs_checkpoint):
    """A dataset whose targets were segmented by the operator with its default outputs."""
    dataset = make_dataset(3)
    run_operator("segment_concept", dataset, {"prompt": "star", "checkpoint": coprs_checkpoint})
    dataset.reload()
    return dataset


def test_the_operator_stores_the_prior(fo, segmented, coprs_checkpoint):
    from conceptseg_hf.integrations.fiftyone import get_pipeline

    targets = segmented.load_saved_view("targets")
    assert targets.count("concept") == targets.count("concept_heatmap") == 3
    for sample in targets:
        result = get_pipeline(coprs_checkpoint)(sample.filepath, prompt="star")
        heatmap = sample["concept_heatmap"]
        assert isinstance(heatmap, fo.Heatmap) and heatmap.map_path.endswith(".png")
        assert heatmap.get_map().shape == result["heatmap"].shape
        assert np.abs(heatmap.get_map() / 255 - result["heatmap"]).max() <= 0.5 / 255 + 1e-5
        assert np.ptp(result["heatmap"]) > 0.05  # the prior is not constant
        assert np.array_equal(sample["concept"].get_mask(), np.asarray(result["mask"]))
        assert sample["concept"]["route_reason"] == "CoPRS reasons about every prompt"


def test_the_model_returns_the_prior(fo, make_dataset, coprs_checkpoint, tmp_path):
    from conceptseg_hf.integrations.fiftyone import ConceptSegFiftyOneModel

    targets = make_dataset(1).load_saved_view("targets")
    model = ConceptSegFiftyOneModel(coprs_checkpoint, prompt="star", heatmap=True)
    labels = model.predict(targets.first().filepath)
    assert set(labels) == {"segmentation", "heatmap"}
    expected = model.pipeline(targets.first().filepath, prompt="star")["heatmap"]
    np.testing.assert_allclose(labels["heatmap"].map, expected, atol=1e-6)
    with pytest.raises(ValueError, match="router is 'sam_only', but CoPRS always reasons"):
        ConceptSegFiftyOneModel(coprs_checkpoint, prompt="star", router="sam_only")


def test_the_form_follows_the_checkpoint(make_dataset, form_of, messages, coprs_checkpoint):
    dataset = make_dataset(1)
    inputs = form_of("segment_concept", dataset, {"prompt": "star", "checkpoint": coprs_checkpoint})
    assert inputs["prior"].default is True
    assert "positional prior" in inputs["prior"].view.description
    assert "heatmap" not in inputs
    assert "prior" not in form_of("segment_concept", dataset, {"prompt": "star"})
    [fault] = messages(
        "segment_concept",
        dataset,
        {"prompt": "star", "checkpoint": coprs_checkpoint, "router": "sam_only"},
    )
    assert "CoPRS always reasons" in fault


def test_outputs_can_be_disabled(make_dataset, run_operator, coprs_checkpoint):
    dataset = make_dataset(2)
    parameters = {"prompt": "star", "checkpoint": coprs_checkpoint}
    # The App sends the default of the input "heatmap", which the form had before the checkpoint was entered.
    run_operator("segment_concept", dataset, parameters | {"field": "a", "heatmap": False, "prior": True})
    run_operator("segment_concept", dataset, parameters | {"field": "b", "prior": False})
    run_operator("segment_concept", dataset, parameters | {"field": "c", "heatmap": False})
    dataset.reload()
    assert [dataset.has_field(f"{name}_heatmap") for name in "abc"] == [True, False, False]


def test_the_loop_refuses_a_route_before_the_first_sample(make_dataset, coprs_checkpoint):
    from conceptseg_hf.integrations.fiftyone import SegmentationJob, segment_collection

    dataset = make_dataset(1)
    job = SegmentationJob(prompt="star", checkpoint=coprs_checkpoint, router="sam_only")
    with pytest.raises(ValueError, match="router is 'sam_only', but CoPRS always reasons"):
        next(segment_collection(dataset, job))
    assert not dataset.has_field("concept")


def test_the_panel_shows_the_prior(open_explorer, segmented):
    explorer, context = open_explorer(segmented)
    state, ids = context.panel.state, segmented.load_saved_view("targets").values("id")
    module = sys.modules[type(explorer).__module__]
    assert state["has_heatmaps"] and not state["has_presence"]
    assert [(row["rule"], row["samples"]) for row in state["rules"]] == [(module.PRIOR, 3)]
    # CoPRS writes neither rule nor answer, so these are not failures.
    assert not {row["kind"] for row in state["failures"]} & {
        "no rule in the completion",
        "no answer in the completion",
    }
    explorer.show_heatmaps(context)
    assert context.active_fields == ["concept_heatmap"]
    context.params["row"] = 0
    explorer.show_rule(context)
    assert [view.values("id") for view in context.shown] == [ids, ids]


def test_the_panel_distinguishes_systems_and_completions_without_the_token(open_explorer, segmented):
    from conceptseg_hf.coprs.inference import NO_POSITION

    first, second, _ = segmented.load_saved_view("targets")
    first["concept"]["route_reason"] = NO_POSITION
    first.save()
    second["concept"]["route_reason"], second["concept"]["route"] = "presence 0.9", "shortcut"
    second.save()
    explorer, context = open_explorer(segmented)
    module = sys.modules[type(explorer).__module__]
    counts = {row["rule"]: row["samples"] for row in context.panel.state["rules"]}
    assert counts == {module.PRIOR: 2, module.NO_RULE: 1}
    failures = {row["kind"]: row["samples"] for row in context.panel.state["failures"]}
    assert failures[NO_POSITION] == 1 and "no rule in the completion" not in failures
