"""References that are samples of a dataset: their boxes or masks, as the processor takes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import fiftyone as fo
from bson import ObjectId

from ...images import load_image
from ...references import MAX_REFERENCES, Reference
from .labels import mask_of, pixel_box
from .schema import (
    GROUND_TRUTH,
    REFERENCE_BOXES,
    REFERENCE_IDS,
    fields_of_type,
    prediction_fields,
    whole_dataset,
)
from .true_masks import load_true_mask

BOX_TYPES = (fo.Detections, fo.Detection, fo.Segmentation)
"""Labels that can mark the concept in a reference."""

AUTO = "auto"
"""In place of a field that marks the concept: the likeliest of the dataset."""


def reference_label_fields(samples: fo.core.collections.SampleCollection) -> list[str]:
    """The fields that can mark a concept, the likeliest first."""
    names = fields_of_type(samples, *BOX_TYPES)
    return sorted(names, key=lambda name: (name != REFERENCE_BOXES, name != GROUND_TRUTH))


def resolve_label_field(samples: fo.core.collections.SampleCollection, chosen: str | None) -> str | None:
    """The field that marks the concept: as chosen, or the likeliest for `AUTO`; None if there is none.

    Of itself it takes no predictions: what a run writes must not become its own references.
    """
    if chosen != AUTO:
        return chosen
    predictions = prediction_fields(samples)
    return next((name for name in reference_label_fields(samples) if name not in predictions), None)


def references_from(
    samples: Iterable[fo.Sample],
    label_field: str | None = None,
    proxy: bool = True,
    unmarked: bool = False,
    label_ids: Collection[str] = (),
) -> list[Reference]:
    """Samples as references.

    Args:
        samples: The samples, in order.
        label_field: The field of boxes (`Detections`, `Detection`) or masks (`Segmentation`) that mark the concept;
            None: the images alone. A sample with several boxes gives several references.
        proxy: Withhold the box of the first, so that the model checks its rule on it.
        unmarked: Show a sample without box or mask in that field as an image alone, rather than raise.
        label_ids: Ids of the `Detections` that count; all by default.

    Raises:
        ValueError: If a sample has no box or mask in that field (unless `unmarked`) or a mask of several classes, or
            there are more than nine references.
    """
    references: list[Reference] = []
    role = "auto" if proxy else "support"
    for sample in samples:
        found = [] if label_field is None else _marked(sample, label_field, role, label_ids)
        if not found and (unmarked or label_field is None):
            found = [Reference(sample.filepath, role="support")]
        if not found:
            raise ValueError(
                f"reference {sample.filename!r} has neither box nor mask in {label_field!r}; mark the concept there, "
                "choose another field, or leave the sample out."
            )
        references += found
        if len(references) > MAX_REFERENCES:
            raise ValueError(
                f"there are more than {MAX_REFERENCES} references; at most {MAX_REFERENCES} fit, so choose fewer."
            )
    return references


def samples_by_id(samples: fo.core.collections.SampleCollection, ids: Sequence[str]) -> list[fo.Sample]:
    """The samples of these ids, in order.

    Raises:
        ValueError: If the dataset lacks some of them.
    """
    valid = [sample_id for sample_id in ids if ObjectId.is_valid(sample_id)]
    found = list(whole_dataset(samples).select(valid, ordered=True))
    missing = {*ids}.difference(sample.id for sample in found)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(set(ids))} references are not in the dataset; choose others."
        )
    return found


def has_marks(sample: fo.Sample, label_field: str) -> bool:
    """Whether a sample has a box or mask in a field."""
    label = sample[label_field]
    if isinstance(label, fo.Detections):
        return bool(label.detections)
    return isinstance(label, fo.Detection) or (isinstance(label, fo.Segmentation) and label.has_mask)


def view_with_references(samples: fo.core.collections.SampleCollection, ids: Sequence[str]) -> fo.DatasetView:
    """Some targets, each after its own references (`reference_ids`): what the model saw, side by side."""
    dataset = whole_dataset(samples)
    ordered: list[str] = []
    for sample in dataset.select(ids, ordered=True).select_fields(REFERENCE_IDS):
        ordered += [*(sample[REFERENCE_IDS] or ()), sample.id]
    return dataset.select(list(dict.fromkeys(ordered)), ordered=True)


def _marked(sample: fo.Sample, label_field: str, role: str, label_ids: Collection[str]) -> list[Reference]:
    if not has_marks(sample, label_field):
        return []
    label = sample[label_field]
    if isinstance(label, fo.Segmentation):
        load_true_mask(label)  # several classes would teach the wrong concept
        return [Reference(sample.filepath, mask=mask_of(label), role=role)]
    detections = label.detections if isinstance(label, fo.Detections) else [label]
    size = load_image(sample.filepath).size
    return [
        Reference(sample.filepath, box=pixel_box(detection.bounding_box, size), role=role)
        for detection in detections
        if not label_ids or detection.id in label_ids
    ]
