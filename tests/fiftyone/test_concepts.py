"""Tests of concepts that are induced from, edited on and applied to samples of a dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def run(shadows, job, **options):
    from conceptseg_hf.integrations.fiftyone import segment_collection

    *_, progress = segment_collection(shadows, job, **options)
    return progress


def foreground_iou(sample, field):
    first, second = (sample[name].get_mask() > 0 for name in (field, "ground_truth"))
    return np.logical_and(first, second).sum() / np.logical_or(first, second).sum()


def test_an_induced_concept_is_stored_and_applied(shadows, ids, induced):
    from conceptseg_hf import Reference, induce
    from conceptseg_hf.integrations.fiftyone import (
        concept_job,
        concept_names,
        get_pipeline,
        load_concept,
        reference_scores,
    )

    assert concept_names(shadows) == ["shadow"] and load_concept(shadows, "shadow") == induced
    assert induced.concept.is_reliable and induced.reference_label_field == "ground_truth"
    pipeline = get_pipeline()
    references = [
        Reference(sample.filepath, mask=sample["ground_truth"].mask_path)
        for sample in shadows.select(ids[:3], ordered=True)
    ]
    assert induce(pipeline.model, pipeline.processor, "shadow", references) == induced.concept
    rows = reference_scores(shadows, induced)
    assert [row["id"] for row in rows] == ids[:3]
    assert np.mean([row["iou"] for row in rows]) == pytest.approx(induced.concept.score)

    progress = run(shadows, concept_job(shadows, "shadow"))
    assert (progress.done, progress.errors) == (7, {})  # without the references
    found, others = shadows.select(ids[3:5]), shadows.select(ids[5:])
    assert shadows.select(ids[:3]).count("shadow") == 0
    assert found.values("shadow.route") == ["concept"] * 2
    assert all(foreground_iou(sample, "shadow") > 0.7 for sample in found)
    assert "concept" not in others.count_values("shadow.route") and others.count("shadow.route") == 5
    assert set(shadows.distinct("shadow.concept")) == set(shadows.distinct("shadow.prompt")) == {"shadow"}
    assert set(found.values("shadow.threshold")) == {induced.concept.threshold}


def test_boxes_and_instance_masks_mark_references(fo, shadows, ids):
    """All boxes of an image mark one reference; instance masks are used as masks."""
    from conceptseg_hf.integrations.fiftyone.concepts import marked_references

    sample = shadows[ids[0]]
    width, height = sample.compute_metadata() or (sample.metadata.width, sample.metadata.height)
    boxes = [[0.25, 0.25, 0.25, 0.5], [0.625, 0.5, 0.125, 0.25]]
    sample["boxes"] = fo.Detections(detections=[fo.Detection(bounding_box=box) for box in boxes])
    mask = np.zeros((height // 2, width // 4), dtype=bool)
    mask[3:7, 2:5] = True
    sample["instances"] = fo.Detections(detections=[fo.Detection(bounding_box=boxes[0], mask=mask)])
    sample["partly"] = fo.Detections(
        detections=[fo.Detection(bounding_box=boxes[0], mask=mask), fo.Detection(bounding_box=boxes[1])]
    )
    sample.save()
    [reference] = marked_references(shadows, ids[:1], "boxes")
    assert reference.mask is None and [tuple(box) for box in reference.boxes] == [
        (width * x, height * y, width * (x + w), height * (y + h)) for x, y, w, h in boxes
    ]
    [reference] = marked_references(shadows, ids[:1], "instances")
    expected = np.zeros((height, width), dtype=bool)
    expected[height // 4 + 3 : height // 4 + 7, width // 4 + 2 : width // 4 + 5] = True
    assert np.array_equal(reference.mask > 0, expected)
    [reference] = marked_references(shadows, ids[:1], "partly")
    assert reference.mask is None and len(reference.boxes) == 2
    [reference] = marked_references(shadows, ids[:1], "ground_truth")
    assert reference.mask == sample["ground_truth"].mask_path


def test_references_that_cannot_be_used_are_named_before_the_model_is_loaded(shadows, ids, monkeypatch):
    from conceptseg_hf.integrations.fiftyone import InductionJob, concepts, induce_concept

    monkeypatch.setattr(concepts, "get_pipeline", lambda *_: pytest.fail("the model was loaded"))
    bare = shadows[ids[1]]
    bare["ground_truth"] = None
    bare.save()
    for job, message in (
        (
            InductionJob("shadow", []),
            "there are no references; select samples in which the concept is marked",
        ),
        (InductionJob(" ", ids[:2]), "prompt is empty"),
        (
            InductionJob("shadow", ids[:2]),
            f"reference '{bare.filename}' has no box or mask in 'ground_truth'",
        ),
        (InductionJob("shadow", ["0" * 24]), "1 of 1 references are not in the dataset"),
        (
            InductionJob("shadow", ids[:1], negative_ids=ids[:2]),
            "1 samples are references and samples without",
        ),
        (InductionJob("shadow", ids[:1], checkpoint="nowhere"), "checkpoint 'nowhere' was not found"),
        (InductionJob("shadow", ids[:1], name="x" * 101), "concept name 'x+' is invalid"),
        (InductionJob("shadow", ids[:1], num_samples=0), "num_samples is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            induce_concept(shadows, job)
    shadows.delete_sample_fields(["ground_truth", "ref_boxes", "ignore"])
    with pytest.raises(ValueError, match="the dataset has no field with masks or boxes"):
        induce_concept(shadows, InductionJob("shadow", ids[:1]))


def test_negatives_set_the_threshold(shadows, ids, induced):
    from conceptseg_hf.integrations.fiftyone import ConceptEdit, InductionJob, edit_concept, induce_concept

    job = InductionJob("shadow", ids[:3], name="strict", negative_ids=ids[5:8])
    strict = induce_concept(shadows, job)
    assert strict.concept.threshold != induced.concept.threshold
    assert strict.concept.phrases == induced.concept.phrases and strict.negative_ids == tuple(ids[5:8])
    again = edit_concept(shadows, ConceptEdit("strict", rule="the shadow"))  # verified on the same samples
    assert again.concept.threshold == strict.concept.threshold and again.negative_ids == strict.negative_ids
    shadows.delete_samples(ids[5:7])
    fewer = edit_concept(shadows, ConceptEdit("strict"))
    assert fewer.negative_ids == (ids[7],) and fewer.concept.score == pytest.approx(strict.concept.score)


def test_a_name_is_replaced_only_on_request(shadows, ids, induced):
    from dataclasses import replace

    from conceptseg_hf.integrations.fiftyone import InductionJob, concept_names, induce_concept, load_concept

    job = InductionJob("shadow", ids[1:3])
    with pytest.raises(ValueError, match="a concept 'shadow' is already in the library of this dataset"):
        induce_concept(shadows, job)
    assert load_concept(shadows, "shadow") == induced
    induce_concept(shadows, replace(job, replace=True))
    assert concept_names(shadows) == ["shadow"]
    assert load_concept(shadows, "shadow").reference_ids == tuple(ids[1:3])


def test_an_edited_rule_proposes_phrases_that_are_verified(shadows, ids, induced):
    from conceptseg_hf.integrations.fiftyone import ConceptEdit, edit_concept, load_concept

    # Phrases are used as they are.
    bad = edit_concept(shadows, ConceptEdit("shadow", phrases=["star"]))
    assert bad.concept.phrases == ("star",) and bad.concept.score < 0.3 and not bad.concept.is_reliable
    assert load_concept(shadows, "shadow") == bad and bad.concept.rule == induced.concept.rule
    # An edited rule proposes better ones.
    good = edit_concept(shadows, ConceptEdit("shadow", rule="find the shadow"))
    assert good.concept.phrases == ("shadow",) and good.concept.rule == "find the shadow"
    assert good.concept.score == pytest.approx(induced.concept.score) and good.concept.is_reliable
    assert [row.name for row in good.concept.scores] == ["shadow", "star"]
    # Worse ones are not used.
    worse = edit_concept(shadows, ConceptEdit("shadow", rule="find the star"))
    assert worse.concept.phrases == ("shadow",) and worse.concept.rule == "find the star"
    assert worse.concept.score == pytest.approx(good.concept.score)
    same = edit_concept(shadows, ConceptEdit("shadow", rule="find the star", phrases=["shadow"]))
    assert same.concept.phrases == ("shadow",) and len(same.concept.scores) == 1
    assert edit_concept(shadows, ConceptEdit("shadow", rule=" ")).concept.rule is None


def test_edits_that_cannot_be_verified_change_nothing(shadows, ids, induced):
    from conceptseg_hf.integrations.fiftyone import ConceptEdit, edit_concept, load_concept

    for edit, message in (
        (
            ConceptEdit("moon", rule="x"),
            "concept 'moon' is not in the library of this dataset; use one of 'shadow'",
        ),
        (ConceptEdit("shadow", phrases=[" "]), "there are no phrases"),
        (ConceptEdit("shadow", rule="x", checkpoint="nowhere"), "checkpoint 'nowhere' was not found"),
    ):
        with pytest.raises(ValueError, match=message):
            edit_concept(shadows, edit)
    shadows.delete_samples(ids[1:3])
    fewer = edit_concept(shadows, ConceptEdit("shadow", rule="dark"))
    assert fewer.reference_ids == (ids[0],) and fewer.concept.reasoning_score is None
    shadows.delete_samples(ids[:1])
    with pytest.raises(
        ValueError, match="concept 'shadow' has no references in this dataset; select samples"
    ):
        edit_concept(shadows, ConceptEdit("shadow", rule="x"))
    assert load_concept(shadows, "shadow") == fewer
    other = edit_concept(shadows, ConceptEdit("shadow", reference_ids=ids[3:5]))
    assert other.reference_ids == tuple(ids[3:5]) and len(other.concept.scores[0].per_reference) == 2


def test_an_edited_concept_runs_again_with_the_settings_of_its_last_run(shadows, ids, induced):
    from conceptseg_hf.integrations.fiftyone import (
        ConceptEdit,
        SegmentationJob,
        concept_job,
        edit_concept,
        last_settings,
    )

    assert last_settings(shadows, "shadow") == {}
    options = {"field": "dark", "router": "sam_only", "outputs": ("detections",), "label": "shade"}
    run(shadows, concept_job(shadows, "shadow", **options))
    first = shadows.values("dark.run")
    settings = last_settings(shadows, "shadow")
    assert settings == options | {"outputs": ["detections"], "checkpoint": "nano"}
    edit_concept(shadows, ConceptEdit("shadow", phrases=["star"]))
    progress = run(shadows, concept_job(shadows, "shadow", **settings))
    assert (progress.done, progress.skipped) == (7, 0)
    keys = set(filter(None, shadows.values("dark.run")))
    assert len(keys) == 1 and not keys & set(first) and len(shadows.list_runs(method="segment_concept")) == 2
    # The first run can be repeated, although its concept was changed.
    [old] = set(filter(None, first))
    assert SegmentationJob.load(shadows, old).concept == induced.concept
    assert SegmentationJob.load(shadows, old).key(shadows) == old


def test_an_interrupted_run_is_resumed_unless_the_concept_was_edited(shadows, ids, induced):
    from conceptseg_hf.integrations.fiftyone import (
        ConceptEdit,
        cancel_segmentation,
        concept_job,
        edit_concept,
        segment_collection,
    )

    job = concept_job(shadows, "shadow", router="sam_only", batch_size=2)
    running = segment_collection(shadows, job)
    next(running), next(running)
    assert cancel_segmentation(shadows, "shadow")
    *_, cancelled = running
    assert cancelled.cancelled and cancelled.done == 4
    kept = shadows.exists("shadow").values("shadow.id")
    resumed = run(shadows, concept_job(shadows, "shadow", router="sam_only", batch_size=2))
    assert (resumed.done, resumed.skipped) == (3, 4)
    assert set(kept) <= set(shadows.values("shadow.id"))

    running = segment_collection(shadows, job)
    next(running), next(running)
    running.close()
    edit_concept(shadows, ConceptEdit("shadow", phrases=["shadow object"]))
    again = run(shadows, concept_job(shadows, "shadow", router="sam_only", batch_size=2))
    assert (again.done, again.skipped) == (7, 0)


def test_a_concept_of_other_weights_is_refused_before_the_first_sample(fo, shadows, ids, induced, make_model):
    from dataclasses import replace

    from conceptseg_hf import ConceptSegmentationPipeline
    from conceptseg_hf.integrations.fiftyone import concept_job, get_pipeline, save_concept
    from conceptseg_hf.integrations.fiftyone.checkpoints import fault_of_concept

    other = ConceptSegmentationPipeline(model=make_model(seed=3), processor=get_pipeline().processor)
    with pytest.raises(ValueError, match="concept 'shadow' was made with other weights of SAM 3 or the CTM"):
        run(shadows, concept_job(shadows, "shadow"), pipeline=other)
    assert not shadows.has_field("shadow")
    foreign = replace(induced, name="foreign", concept=replace(induced.concept, model_hash="0" * 16))
    save_concept(shadows, foreign)
    assert "made with other weights" in fault_of_concept(foreign.concept, "nano")
    assert fault_of_concept(induced.concept, "nano") is None
    with pytest.raises(ValueError, match="made with other weights"):
        run(shadows, concept_job(shadows, "foreign"))


def test_both_routes_of_a_concept_are_compared(shadows, ids, induced):
    from conceptseg_hf.integrations.fiftyone import concept_job, segment_other_route

    run(shadows, concept_job(shadows, "shadow"))
    *_, progress = segment_other_route(shadows, "shadow")
    assert progress.done == 7
    first, second = (shadows.values(f"{field}.route") for field in ("shadow", "shadow_other_route"))
    assert {(one == "concept", other == "concept") for one, other in zip(first, second) if one} == {
        (True, False),
        (False, True),
    }
    assert set(shadows.distinct("shadow_other_route.concept")) == {"shadow"}


def test_apply_model_applies_a_concept_file(shadows, ids, induced, tmp_path):
    from conceptseg_hf.integrations.fiftyone import (
        ConceptSegFiftyOneModel,
        concept_job,
        declare_prediction_fields,
        export_concept,
    )

    path = export_concept(shadows, "shadow", tmp_path / "shadow.safetensors")
    run(shadows, concept_job(shadows, "shadow", router="sam_only"))
    declare_prediction_fields(shadows, "applied")
    view = shadows.select(ids[3:])
    view.apply_model(ConceptSegFiftyOneModel(concept=path, router="sam_only"), "applied")
    for sample in view:
        assert np.array_equal(sample["applied"].mask > 0, sample["shadow"].get_mask() > 0)
    assert set(view.values("applied.route")) == {"concept"} and set(view.values("applied.prompt")) == {
        "shadow"
    }
    with pytest.raises(FileNotFoundError, match="is not a file"):
        ConceptSegFiftyOneModel(concept=tmp_path / "none.safetensors")


@pytest.mark.parametrize("label", [None, "shade"])
def test_exports_of_a_concept_have_one_class(fo, shadows, ids, induced, tmp_path, label):
    """The class is the prompt of the concept or `label`, regardless of the VLM's answers."""
    import fiftyone.types as fot

    from conceptseg_hf.integrations.fiftyone import concept_job

    job = concept_job(shadows, "shadow", outputs=("segmentation", "detections"), label=label)
    run(shadows, job)
    predicted = shadows.select(ids[3:])
    assert len(set(predicted.values("shadow.answer"))) > 1
    expected = label or "shadow"
    assert shadows.mask_targets["shadow"] == {255: label or "concept"}
    field = "shadow_detections"
    count = predicted.count(f"{field}.detections")
    assert predicted.count_values(f"{field}.detections.label") == {expected: count} and count >= 2
    predicted.export(str(tmp_path / "coco"), dataset_type=fot.COCODetectionDataset, label_field=field)
    content = json.loads((tmp_path / "coco" / "labels.json").read_text())
    assert [category["name"] for category in content["categories"]] == [expected]
    assert len(content["annotations"]) == count
    predicted.export(str(tmp_path / "yolo"), dataset_type=fot.YOLOv5Dataset, label_field=field)
    assert expected in (tmp_path / "yolo" / "dataset.yaml").read_text()
    lines = [line for file in (tmp_path / "yolo").rglob("*.txt") for line in file.read_text().splitlines()]
    assert len(lines) == count and {line.split()[0] for line in lines} == {"0"}
