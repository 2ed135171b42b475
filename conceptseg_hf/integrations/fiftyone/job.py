"""What to segment and how; kept with the dataset, so that a prediction can say what made it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiftyone as fo

from ...images import load_image, load_mask
from ...references import Reference
from ...router import ROUTER_MODES
from .checkpoints import NANO
from .reference_samples import AUTO, check_references, references_from, resolve_label_field, samples_by_id
from .runs import check_output_fields, keep_run, load_run, run_key

_KEPT = (
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
)


@dataclass(frozen=True)
class SegmentationJob:
    """What to segment, and how.

    Attributes:
        field: Where predictions go; see `schema.output_fields`.
        prompt: The concept in words.
        prompt_field: Or the sample field that holds each sample's own words.
        references: References that all samples share.
        reference_ids: Or the ids of samples that serve all others as references.
        reference_ids_field: Or the sample field that lists the ids of each sample's own references.
        reference_label_field: The field that marks the concept in reference samples; `"auto"`: of the likeliest the one
            that marks the most of them; None: they are shown unmarked.
        reference_label_ids: Ids of the labels that mark the concept there, of `Detections`; all by default.
        proxy: Withhold the box of the first boxed reference sample, so that the rule is checked.
        boxes_together: Make one reference of a reference sample with several boxes, instead of one for each box.
        checkpoint: `"nano"`, a folder or a hub id.
        router: `"adaptive"`, `"sam_only"` or `"full_reasoning"`.
        outputs: See `schema.OUTPUTS`.
        label: Class of the detections, and of the masks' foreground in the dataset's `mask_targets`. By default the
            detections of a sample have its prompt as their class; the answer is an attribute.
        skip_existing: Leave samples that have a prediction without error. None: those alone that a run with these
            settings has made, if it was interrupted (killed, cancelled or failed before its end).
        batch_size: Samples at a time.
        folder: Where masks and heatmaps go; FiftyOne's folder for data by default.
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

    def check(self, samples: fo.core.collections.SampleCollection) -> None:
        """Finds what cannot work before any work.

        Raises:
            ValueError: One sentence.
        """
        if samples.media_type not in (None, "image", "group"):
            raise ValueError(
                f"these samples are of type {samples.media_type!r}; choose a dataset or view of images."
            )
        if samples._is_generated:
            raise ValueError(
                "this is a view of patches, whose labels are not kept; choose a view of whole images."
            )
        if not (self.prompt or "").strip() and self.prompt_field is None:
            raise ValueError("there is no prompt; give words, or the field that holds them.")
        dataset = samples._dataset  # a view may hide fields, which a run reads and writes all the same
        label_field = None if self.reference_label_field == AUTO else self.reference_label_field
        for name, value in (
            ("prompt", self.prompt_field),
            ("reference", self.reference_ids_field),
            ("reference", label_field),
        ):
            if value is not None and not dataset.has_field(value):
                raise ValueError(f"{name} field {value!r} is not in the dataset; give one of its fields.")
        if self.router not in ROUTER_MODES:
            raise ValueError(f"router is {self.router!r}; use one of {', '.join(ROUTER_MODES)}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; use at least 1.")
        if self.label is not None and not self.label.strip():
            raise ValueError("label is empty; give the name of a class, or None for the prompt.")
        if (bool(self.references), bool(self.reference_ids), self.reference_ids_field is not None).count(
            True
        ) > 1:
            raise ValueError(
                "there are several kinds of references; give one of references, reference_ids and reference_ids_field."
            )
        self.shared_references(samples)
        check_output_fields(dataset, self.field, self.outputs)

    def shared_references(self, samples: fo.core.collections.SampleCollection) -> Sequence[Reference]:
        """The references that all samples share.

        Raises:
            ValueError: If a reference sample is gone or has no mark, or a reference cannot be used; its file is named.
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
        """The field that marks the concept in reference samples; None: they are shown unmarked."""
        return resolve_label_field(dataset, self.reference_label_field, self.reference_ids)

    def keep(self, dataset: fo.Dataset) -> str:
        """Keeps the settings with the dataset; see `keep_run`."""
        return keep_run(dataset, self.field, self._settings(dataset))

    def key(self, dataset: fo.Dataset) -> str:
        """The key under which `keep` keeps them."""
        return run_key(self.field, self._settings(dataset))

    def _settings(self, dataset: fo.Dataset) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in _KEPT}
        settings |= {"outputs": sorted(self.outputs), "other_references": _digest_of(self.references)}
        settings |= {name: list(settings[name]) for name in ("reference_ids", "reference_label_ids")}
        if not self.boxes_together:  # runs of before have no such setting
            del settings["boxes_together"]
        if self.reference_ids or self.reference_ids_field is not None:  # what is likeliest may change
            settings["reference_label_field"] = self.label_field(dataset)
        return settings

    @classmethod
    def load(cls, dataset: fo.Dataset, key: str) -> SegmentationJob:
        """The job of a run that was kept.

        Raises:
            ValueError: If there is no such run, or its references were no samples of the dataset.
        """
        settings = load_run(dataset, key)
        if settings["other_references"]:
            raise ValueError(
                f"run {key!r} had references that are no samples of the dataset, so it cannot be repeated; "
                "add them as samples and give reference_ids."
            )
        return cls(**{name: settings[name] for name in _KEPT if name in settings})


def _digest_of(references: Sequence[Reference]) -> str | None:
    """What tells references outside the dataset from others; None if there are none."""
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
