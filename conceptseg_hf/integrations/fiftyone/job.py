"""Settings of a segmentation run, which are stored with the dataset so that each prediction refers to its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiftyone as fo

from ...concept_prompt import ConceptPrompt
from ...images import load_image, load_mask
from ...references import Reference
from ...router import ROUTER_MODES
from .checkpoints import NANO
from .concept_library import decoded, encoded
from .reference_samples import AUTO, check_references, references_from, resolve_label_field, samples_by_id
from .runs import check_output_fields, keep_run, load_run, run_key

_STORED_SETTINGS = (
    "field",
    "prompt",
    "prompt_field",
    "reference_ids",
    "reference_ids_field",
    "reference_label_field",
    "reference_label_ids",
    "proxy",
    "boxes_together",
    "checkpoint",
    "router",
    "outputs",
    "label",
    "concept_name",
)
_OPTIONAL_SETTINGS = ("boxes_together", "concept", "concept_name")
"""Settings that are only stored if they are set, as the keys of runs from before they existed must not change."""


@dataclass(frozen=True)
class SegmentationJob:
    """Settings of a segmentation run.

    Attributes:
        field: Field for the predictions; see `schema.output_fields`.
        prompt: Prompt for all samples.
        prompt_field: Sample field with a prompt per sample, as an alternative to `prompt`.
        references: References for all samples.
        reference_ids: Ids of the samples that are references for all other samples, as an alternative to `references`.
        reference_ids_field: Sample field that lists the ids of each sample's own references, as a further alternative.
        reference_label_field: Field with the boxes or masks that mark the concept in reference samples. `"auto"`
            selects the candidate field that marks the most of them; None passes the references without marks.
        reference_label_ids: Ids of the `Detections` labels that mark the concept; all labels by default.
        proxy: Withhold the box of the first boxed reference sample, so that the predicted rule is checked against it.
        boxes_together: Create one reference for a sample with several boxes, instead of one reference per box.
        checkpoint: `"nano"`, a folder or a hub id.
        router: `"adaptive"`, `"sam_only"` or `"full_reasoning"`.
        outputs: See `schema.OUTPUTS`.
        label: Class of the detections, and of the masks' foreground in the dataset's `mask_targets`. By default, the
            class of a detection is the prompt of its sample. The answer is stored as an attribute.
        skip_existing: Skip samples that have a prediction without an error. If None, only skip predictions of an
            interrupted run (killed, cancelled or failed) with the same settings.
        batch_size: Number of samples per batch.
        folder: Folder for masks and heatmaps; inside FiftyOne's default dataset directory by default.
        concept: Concept that SAM 3 applies, see `concepts.concept_job`. Its prompt is the default of `prompt`; the
            references are those of the reasoning.
        concept_name: Name of the concept in the labels' attribute `concept`.
    """

    field: str = "concept"
    prompt: str | None = None
    prompt_field: str | None = None
    references: Sequence[Reference] = ()
    reference_ids: Sequence[str] = ()
    reference_ids_field: str | None = None
    reference_label_field: str | None = AUTO
    reference_label_ids: Sequence[str] = ()
    proxy: bool = True
    checkpoint: str = NANO
    router: str = "adaptive"
    outputs: Sequence[str] = ("segmentation",)
    label: str | None = None
    skip_existing: bool | None = None
    batch_size: int = 8
    folder: str | Path | None = None
    boxes_together: bool = False
    concept: ConceptPrompt | None = None
    concept_name: str | None = None

    def check(self, samples: fo.core.collections.SampleCollection) -> None:
        """Validate the settings for these samples before anything is segmented.

        Raises:
            ValueError: If a setting is invalid, a field is missing, or a shared reference cannot be used.
        """
        if samples.media_type not in (None, "image", "group"):
            raise ValueError(
                f"samples have media type {samples.media_type!r}; choose a dataset or view of images."
            )
        if samples._is_generated:
            raise ValueError(
                "samples are a view of patches, which does not store labels; choose a view of whole images."
            )
        if self.concept is not None:
            encoded(self.concept)  # raises if it is too large
        elif not (self.prompt or "").strip() and self.prompt_field is None:
            raise ValueError(
                "prompt is empty; enter a prompt, or choose the field that contains the prompts."
            )
        dataset = samples._dataset  # a view may hide fields that the run reads or writes
        label_field = None if self.reference_label_field == AUTO else self.reference_label_field
        for name, value in (
            ("prompt", self.prompt_field),
            ("reference", self.reference_ids_field),
            ("reference", label_field),
        ):
            if value is not None and not dataset.has_field(value):
                raise ValueError(f"{name} field {value!r} is not in the dataset; use one of its fields.")
        if self.router not in ROUTER_MODES:
            raise ValueError(f"router is {self.router!r}; use one of {', '.join(ROUTER_MODES)}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; use at least 1.")
        if self.label is not None and not self.label.strip():
            raise ValueError("label is empty; use a class name, or None for the prompt.")
        if (bool(self.references), bool(self.reference_ids), self.reference_ids_field is not None).count(
            True
        ) > 1:
            raise ValueError(
                "several kinds of references are set; use one of references, reference_ids and reference_ids_field."
            )
        self.shared_references(samples)
        check_output_fields(dataset, self.field, self.outputs)

    def shared_references(self, samples: fo.core.collections.SampleCollection) -> Sequence[Reference]:
        """Return the references for all samples.

        Raises:
            ValueError: If a reference sample is missing or has no mark, or a reference file cannot be used.
        """
        if not self.reference_ids:
            check_references(self.references)
            return self.references
        return references_from(
            samples_by_id(samples, self.reference_ids),
            self.label_field(samples._dataset),
            self.proxy,
            label_ids=self.reference_label_ids,
            boxes_together=self.boxes_together,
        )

    def label_field(self, dataset: fo.Dataset) -> str | None:
        """Return the field that marks the concept in reference samples, or None to pass them without marks."""
        return resolve_label_field(dataset, self.reference_label_field, self.reference_ids)

    def keep(self, dataset: fo.Dataset) -> str:
        """Store the settings with the dataset and return their key; see `runs.keep_run`."""
        return keep_run(dataset, self.field, self._settings(dataset))

    def key(self, dataset: fo.Dataset) -> str:
        """Return the key under which `keep` stores the settings."""
        return run_key(self.field, self._settings(dataset))

    def _settings(self, dataset: fo.Dataset) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in _STORED_SETTINGS}
        settings |= {"outputs": sorted(self.outputs), "other_references": _digest_of(self.references)}
        settings |= {name: list(settings[name]) for name in ("reference_ids", "reference_label_ids")}
        settings["concept"] = None if self.concept is None else encoded(self.concept)
        settings = {
            name: value for name, value in settings.items() if value or name not in _OPTIONAL_SETTINGS
        }
        if (
            self.reference_ids or self.reference_ids_field is not None
        ):  # "auto" may resolve to another field later
            settings["reference_label_field"] = self.label_field(dataset)
        return settings

    @classmethod
    def load(cls, dataset: fo.Dataset, key: str) -> SegmentationJob:
        """Load the settings of a stored run.

        Raises:
            ValueError: If the run does not exist, or its references were not samples of the dataset.
        """
        settings = load_run(dataset, key)
        if settings["other_references"]:
            raise ValueError(
                f"run {key!r} cannot be repeated, as its references were not samples of the dataset; "
                "add them as samples and use reference_ids."
            )
        concept = settings.get("concept")
        return cls(
            **{name: settings[name] for name in _STORED_SETTINGS if name in settings},
            concept=None if concept is None else decoded(concept, key),
        )


def _digest_of(references: Sequence[Reference]) -> str | None:
    """Return a hash of references outside the dataset, or None if there are none."""
    if not references:
        return None
    digest = hashlib.sha256()
    for reference in references:
        image = load_image(reference.image)
        boxes = reference.box if reference.boxes is None else reference.boxes
        digest.update(f"{image.size} {boxes} {reference.role}".encode())
        digest.update(image.tobytes())
        if reference.mask is not None:
            digest.update(load_mask(reference.mask, image.size).tobytes())
    return digest.hexdigest()[:16]
