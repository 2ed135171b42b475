"""Induce, edit and apply concepts of a dataset; `concept_library` stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fiftyone as fo
import numpy as np
from bson import ObjectId

from ...images import load_image
from ...induction import induce, verify
from ...phrases import noun_phrases
from ...pipelines import ConceptSegmentationPipeline
from ...progress import ProgressFunction
from ...references import Reference
from .checkpoints import NANO, fault_of, get_pipeline
from .concept_library import (
    StoredConcept,
    check_name,
    default_field,
    default_name,
    load_concept,
    save_concept,
)
from .job import SegmentationJob
from .reference_samples import AUTO, references_from, resolve_label_field, samples_by_id
from .runs import METHOD, stored_settings
from .schema import whole_dataset

_RERUN_SETTINGS = ("field", "router", "outputs", "label", "checkpoint")


@dataclass(frozen=True)
class InductionJob:
    """Settings of an induction.

    Attributes:
        prompt: The concept in words.
        reference_ids: Ids of the samples that show the concept, with boxes or masks.
        name: Name in the library; the prompt by default.
        reference_label_field: Field with the boxes or masks. `"auto"` selects the candidate field that marks the most
            references. All boxes of an image are used together; boxes with instance masks are used as masks.
        negative_ids: Ids of samples without the concept, which are used for the threshold.
        checkpoint: `"nano"`, a folder or a hub id.
        num_samples: Completions per reference.
        refine: Also tune tokens in SAM 3's prompt space on the references.
        replace: Replace a concept of the same name.
        seed: Random seed of sampling and tuning.
    """

    prompt: str
    reference_ids: Sequence[str]
    name: str | None = None
    reference_label_field: str = AUTO
    negative_ids: Sequence[str] = ()
    checkpoint: str = NANO
    num_samples: int = 1
    refine: bool = False
    replace: bool = False
    seed: int = 0

    @property
    def stored_name(self) -> str:
        """Name in the library."""
        return self.name or default_name(self.prompt)

    def check(self, samples: fo.core.collections.SampleCollection) -> None:
        """Validate the settings before the model is loaded.

        Raises:
            ValueError: If a setting is invalid, or a reference cannot be used.
        """
        if not self.prompt.strip():
            raise ValueError("prompt is empty; describe the concept in a few words.")
        check_name(samples, self.stored_name, self.replace)
        if fault := fault_of(self.checkpoint):
            raise ValueError(fault)
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; use at least 1.")
        both = set(self.reference_ids) & set(self.negative_ids)
        if both:
            raise ValueError(
                f"{len(both)} samples are references and samples without the concept; remove them from one of the two."
            )
        self.references(samples)
        self.negatives(samples)

    def label_field(self, samples: fo.core.collections.SampleCollection) -> str | None:
        """Return the field that marks the concept in the references, or None if there is none."""
        return resolve_label_field(samples._dataset, self.reference_label_field, self.reference_ids)

    def references(self, samples: fo.core.collections.SampleCollection) -> list[Reference]:
        """Return the references, one for each sample.

        Raises:
            ValueError: If one of them cannot be used.
        """
        return marked_references(samples, self.reference_ids, self.label_field(samples))

    def negatives(self, samples: fo.core.collections.SampleCollection) -> list[str]:
        """Return the files of the samples without the concept.

        Raises:
            ValueError: If a sample is not in the dataset.
        """
        return [sample.filepath for sample in samples_by_id(samples, self.negative_ids)]


def induce_concept(
    samples: fo.core.collections.SampleCollection,
    job: InductionJob,
    pipeline: ConceptSegmentationPipeline | None = None,
    progress: bool | ProgressFunction = False,
) -> StoredConcept:
    """Induce a concept from samples with boxes or masks, and store it in the library of their dataset.

    Args:
        samples: Dataset or view.
        job: Settings of the induction.
        pipeline: Pipeline to use; that of `job.checkpoint` by default.
        progress: Whether to show a progress bar, or a function to call instead; see `induction.induce`.

    Returns:
        The stored concept.

    Raises:
        ValueError: If a setting is invalid, or a reference cannot be used.
    """
    job.check(samples)
    pipeline = pipeline or get_pipeline(job.checkpoint)
    concept = induce(
        pipeline.model,
        pipeline.processor,
        job.prompt,
        job.references(samples),
        job.negatives(samples),
        num_samples=job.num_samples,
        refine=job.refine,
        seed=job.seed,
        progress=progress,
    )
    stored = StoredConcept(
        job.stored_name,
        concept,
        job.checkpoint,
        tuple(job.reference_ids),
        job.label_field(samples),
        tuple(job.negative_ids),
    )
    save_concept(samples, stored, job.replace)
    return stored


@dataclass(frozen=True)
class ConceptEdit:
    """Changes of a concept in the library, which are verified on references.

    Attributes:
        name: Name of the concept.
        rule: The edited rule, "" for none; None leaves it unchanged. If only the rule is edited, its noun phrases
            replace the concept's phrases if they explain the references better.
        phrases: The edited phrases, which are used as they are; None leaves the choice to the verification.
        reference_ids: Ids of the samples to verify the concept on; by default those of the concept that are still in
            the dataset.
        reference_label_field: Field that marks the concept in `reference_ids`.
        checkpoint: Checkpoint with the weights of the concept; the one that is stored with it by default.
    """

    name: str
    rule: str | None = None
    phrases: Sequence[str] | None = None
    reference_ids: Sequence[str] = ()
    reference_label_field: str = AUTO
    checkpoint: str | None = None

    def resolved(self, samples: fo.core.collections.SampleCollection) -> StoredConcept:
        """Return the edited concept before its verification, with the references to verify it on.

        Raises:
            ValueError: If the library has no such concept, or it cannot be verified.
        """
        stored = load_concept(samples, self.name)
        ids, field = stored.present_references(samples), stored.reference_label_field
        if self.reference_ids:
            ids = list(self.reference_ids)
            field = resolve_label_field(samples._dataset, self.reference_label_field, ids)
        if not ids:
            raise ValueError(
                f"concept {self.name!r} has no references in this dataset; select samples with masks or boxes to "
                "verify it on."
            )
        marked_references(samples, ids, field)  # raises if one cannot be used
        checkpoint = self.checkpoint or stored.checkpoint
        if fault := fault_of(checkpoint):
            raise ValueError(fault)
        concept = stored.concept
        if self.rule is not None:
            concept = concept.with_rule(self.rule.strip() or None)
        if self.phrases is not None and tuple(self.phrases) != concept.phrases:
            if not any(phrase.strip() for phrase in self.phrases):
                raise ValueError("there are no phrases; give at least one phrase for SAM 3.")
            concept = concept.with_phrase(*[phrase.strip() for phrase in self.phrases if phrase.strip()])
        if ids != list(stored.reference_ids):
            concept = replace(concept, reasoning_score=None, reasoning_ious=())  # of other references
        negatives = tuple(stored.present_negatives(samples))
        return StoredConcept(self.name, concept, checkpoint, tuple(ids), field, negatives)


def edit_concept(
    samples: fo.core.collections.SampleCollection,
    edit: ConceptEdit,
    pipeline: ConceptSegmentationPipeline | None = None,
) -> StoredConcept:
    """Edit a concept in the library, verify it on its references, and store it.

    Args:
        samples: Dataset or view.
        edit: The changes; without changes, the concept is verified again.
        pipeline: Pipeline to use; that of the concept's checkpoint by default.

    Returns:
        The stored concept.

    Raises:
        ValueError: If the library has no such concept, it cannot be verified, or it was made with other weights.
    """
    stored, old = edit.resolved(samples), load_concept(samples, edit.name).concept
    pipeline = pipeline or get_pipeline(stored.checkpoint)
    edited = stored.concept
    rule_only = edited.rule != old.rule and edited.phrases == old.phrases
    concept = verify(
        edited,
        pipeline.model,
        pipeline.processor,
        marked_references(samples, stored.reference_ids, stored.reference_label_field),
        [sample.filepath for sample in samples_by_id(samples, stored.negative_ids)],
        candidates=noun_phrases(edited.rule or "") if rule_only else (),
    )
    stored = replace(stored, concept=concept)
    save_concept(samples, stored, replace_existing=True)
    return stored


def concept_job(samples: fo.core.collections.SampleCollection, name: str, **settings: Any) -> SegmentationJob:
    """Return the settings of a run that applies a concept of the library; see `loop.segment_collection`.

    SAM 3 applies the concept. Where the router reasons, it uses the references of the concept that are still in the
    dataset, or the most useful ones if there are more than four; these samples are not segmented.

    Args:
        samples: Dataset or view.
        name: Name of the concept.
        **settings: Settings of `SegmentationJob`. By default, the predictions are written to a field with the name of
            the concept.

    Raises:
        ValueError: If the library has no such concept, or the concept is damaged.
    """
    stored = load_concept(samples, name)
    defaults = {
        "field": default_field(name),
        "prompt": stored.concept.prompt,
        "reference_ids": stored.shown_references(samples),
        "reference_label_field": stored.reference_label_field,
        "boxes_together": True,
        "checkpoint": stored.checkpoint,
    }
    return SegmentationJob(**{**defaults, **settings, "concept": stored.concept, "concept_name": name})


def last_settings(samples: fo.core.collections.SampleCollection, name: str) -> dict[str, Any]:
    """Return the settings with which a concept was last applied, for `concept_job`; empty if it was not applied.

    With these settings, an edited concept replaces the predictions of the earlier version.
    """
    runs = [
        run for run in stored_settings(samples._dataset, METHOD).values() if run.get("concept_name") == name
    ]
    return {key: runs[-1][key] for key in _RERUN_SETTINGS if key in runs[-1]} if runs else {}


def reference_scores(
    samples: fo.core.collections.SampleCollection, stored: StoredConcept
) -> list[dict[str, Any]]:
    """Return how well a concept explains each of its references.

    Returns:
        For each reference its sample id, the name of its file ("(deleted)" for a sample that is no longer in the
        dataset), and the IoU of the mask of the concept. Empty for a concept without references, or one that was
        verified on other references.
    """
    values = stored.concept.reference_ious
    if len(values) != len(stored.reference_ids):
        return []
    valid = [sample_id for sample_id in stored.reference_ids if ObjectId.is_valid(sample_id)]
    paths = dict(zip(*whole_dataset(samples).select(valid).values(["id", "filepath"]))) if valid else {}
    return [
        {
            "id": sample_id,
            "file": Path(paths[sample_id]).name if sample_id in paths else "(deleted)",
            "iou": float(value),
        }
        for sample_id, value in zip(stored.reference_ids, values, strict=True)
    ]


def summary_of(samples: fo.core.collections.SampleCollection, stored: StoredConcept) -> str:
    """Return `ConceptPrompt.summary` with the file names of the references."""
    names = [row["file"] for row in reference_scores(samples, stored)]
    return stored.concept.summary(names or None)


def marked_references(
    samples: fo.core.collections.SampleCollection, ids: Sequence[str], label_field: str | None
) -> list[Reference]:
    """Return one reference for each sample, with all of its boxes or its mask.

    Raises:
        ValueError: If there are none, there is no field that marks them, or one of them cannot be used.
    """
    if not ids:
        raise ValueError(
            "there are no references; select samples in which the concept is marked by masks or boxes."
        )
    if label_field is None:
        raise ValueError(
            "the dataset has no field with masks or boxes; add one that marks the concept in the references."
        )
    selected = samples_by_id(samples, ids)
    references = references_from(selected, label_field, boxes_together=True, limit=None)
    return [
        _with_instance_masks(reference, sample[label_field])
        for reference, sample in zip(references, selected, strict=True)
    ]


def _with_instance_masks(reference: Reference, label: Any) -> Reference:
    """Use the instance masks of detections as the mask of a reference if all of its detections have one."""
    detections = label.detections if isinstance(label, fo.Detections) else [label]
    if not all(isinstance(each, fo.Detection) and each.has_mask for each in detections):
        return reference
    size = load_image(reference.image).size
    union = np.zeros(size[::-1], dtype=np.uint8)
    for detection in detections:
        union |= detection.to_segmentation(frame_size=size, target=255).mask.astype(np.uint8)
    return replace(reference, mask=union)
