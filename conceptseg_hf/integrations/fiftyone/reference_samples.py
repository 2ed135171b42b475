"""Convert dataset samples with boxes or masks to references."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import fiftyone as fo
from bson import ObjectId

from ...boxes import Box
from ...images import load_image
from ...mosaic import MAX_REFERENCES
from ...references import Reference, Role, resolve_references
from .gt_masks import load_gt_mask
from .labels import mask_of, pixel_box
from .schema import (
    GROUND_TRUTH,
    REFERENCE_BOXES,
    REFERENCE_IDS,
    fields_of_type,
    prediction_fields,
    whole_dataset,
)

BOX_TYPES = (fo.Detections, fo.Detection, fo.Segmentation)
"""Label types that can mark the concept in a reference."""

AUTO = "auto"
"""Value of `reference_label_field` that selects the most likely field of the dataset."""


def reference_label_fields(samples: fo.core.collections.SampleCollection) -> list[str]:
    """Return the fields that can mark a concept, the most likely first."""
    names = fields_of_type(samples, *BOX_TYPES)
    return sorted(names, key=lambda name: (name != REFERENCE_BOXES, name != GROUND_TRUTH))


def resolve_label_field(
    samples: fo.core.collections.SampleCollection, chosen: str | None, ids: Sequence[str] = ()
) -> str | None:
    """Return the field that marks the concept: `chosen`, or for `AUTO` the most likely field; None if there is none.

    `AUTO` never selects predictions, as the output of a run must not become its own references.

    Args:
        samples: Dataset or view.
        chosen: A field, `AUTO` or None.
        ids: Ids of the reference samples, if known. `AUTO` then selects the first of the fields that mark the most of
            them.
    """
    if chosen != AUTO:
        return chosen
    predictions = prediction_fields(samples)
    names = [name for name in reference_label_fields(samples) if name not in predictions]
    if len(names) > 1 and ids:
        counts = {name: count_marked(samples, ids, name) for name in names}
        return max(names, key=lambda name: counts[name])  # the first in case of a tie
    return names[0] if names else None


def count_marked(samples: fo.core.collections.SampleCollection, ids: Sequence[str], label_field: str) -> int:
    """Count the samples with a box or mask in a field, among the first `MAX_REFERENCES` + 1 of the given ids."""
    valid_ids = [sample_id for sample_id in ids if ObjectId.is_valid(sample_id)][: MAX_REFERENCES + 1]
    view = whole_dataset(samples).select(valid_ids).select_fields(label_field)
    return sum(has_marks(sample, label_field) for sample in view)


def references_from(
    samples: Iterable[fo.Sample],
    label_field: str | None = None,
    proxy: bool = True,
    unmarked: bool = False,
    label_ids: Collection[str] = (),
    boxes_together: bool = False,
    limit: int | None = MAX_REFERENCES,
) -> list[Reference]:
    """Convert samples to references.

    Args:
        samples: Reference samples, in order.
        label_field: Field of boxes (`Detections`, `Detection`) or masks (`Segmentation`) that mark the concept; None
            uses the images without marks. A sample with several boxes yields several references, unless
            `boxes_together`.
        proxy: Withhold the box of the first reference, so that the predicted rule is checked against it.
        unmarked: Use a sample without a box or mask in that field as an image without marks, instead of raising.
        label_ids: Ids of the `Detections` labels to use; all by default.
        boxes_together: Create one reference for a sample with several boxes, with all boxes drawn in its image.
        limit: Maximum number of references, or None.

    Raises:
        ValueError: If a sample cannot be a reference: it has no box or mask in that field (unless `unmarked`), a box
            without extent or outside the image, a mask that is empty or has several classes or a different size, or a
            file that cannot be read; or if there are too many references.
    """
    references: list[Reference] = []
    role: Role = "auto" if proxy else "support"
    for sample in samples:
        try:
            sample_references = _marked(sample, label_field, role, label_ids, boxes_together)
        except (ValueError, OSError) as error:
            raise ValueError(f"reference {sample.filename!r} cannot be used: {error}") from error
        if not sample_references and (unmarked or label_field is None):
            sample_references = [Reference(sample.filepath, role="support")]
        if not sample_references:
            raise ValueError(
                f"reference {sample.filename!r} has no box or mask in {label_field!r}; add one, choose another field, "
                "or remove the sample from the references."
            )
        references += sample_references
        if limit is not None and len(references) > limit:
            raise ValueError(f"there are more than {limit} references; use at most {limit}.")
    return references


def check_references(references: Sequence[Reference]) -> None:
    """Check references that are used for all samples.

    Raises:
        ValueError: If a reference cannot be read, or its box or mask is empty. The message contains the file name.
    """
    for index, reference in enumerate(references):
        try:
            _check(reference)
        except ValueError as error:
            path = reference.image if isinstance(reference.image, (str, os.PathLike)) else None
            name = index if path is None else repr(Path(path).name)
            raise ValueError(f"reference {name} cannot be used: {error}") from error


def samples_by_id(samples: fo.core.collections.SampleCollection, ids: Sequence[str]) -> list[fo.Sample]:
    """Return the samples with the given ids, in order.

    Raises:
        ValueError: If the dataset does not contain all of them.
    """
    valid_ids = [sample_id for sample_id in ids if ObjectId.is_valid(sample_id)]
    selected = list(whole_dataset(samples).select(valid_ids, ordered=True))
    missing = {*ids}.difference(sample.id for sample in selected)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(set(ids))} references are not in the dataset; choose others."
        )
    return selected


def has_marks(sample: fo.Sample, label_field: str) -> bool:
    """Whether a sample has a box or mask in a field."""
    label = sample[label_field]
    if isinstance(label, fo.Detections):
        return bool(label.detections)
    return isinstance(label, fo.Detection) or (isinstance(label, fo.Segmentation) and label.has_mask)


def view_with_references(samples: fo.core.collections.SampleCollection, ids: Sequence[str]) -> fo.DatasetView:
    """Return a view of targets, each preceded by its own references (`reference_ids`)."""
    dataset = whole_dataset(samples)
    ordered: list[str] = []
    for sample in dataset.select(ids, ordered=True).select_fields(REFERENCE_IDS):
        ordered += [*(sample[REFERENCE_IDS] or ()), sample.id]
    return dataset.select(list(dict.fromkeys(ordered)), ordered=True)


def _marked(
    sample: fo.Sample, label_field: str | None, role: Role, label_ids: Collection[str], boxes_together: bool
) -> list[Reference]:
    """Return the references of a sample with a box or mask, or an empty list if it has neither.

    Raises:
        ValueError: If the image, a box or the mask cannot be used.
        OSError: If a file is missing.
    """
    image = load_image(sample.filepath)
    if label_field is None or not has_marks(sample, label_field):
        return []
    label = sample[label_field]
    if isinstance(label, fo.Segmentation):
        load_gt_mask(label)  # raises for a mask with several classes, which would show the wrong concept
        _check(Reference(image, mask=mask_of(label)))
        return [Reference(sample.filepath, mask=mask_of(label), role=role)]
    detections = label.detections if isinstance(label, fo.Detections) else [label]
    selected = [detection for detection in detections if not label_ids or detection.id in label_ids]
    limit = None if boxes_together else MAX_REFERENCES + 1
    boxes = [_box_of(detection, label_field, image.size) for detection in selected[:limit]]
    for box in boxes:
        _check(Reference(image, box=box))
    if boxes_together and len(boxes) > 1:
        return [Reference(sample.filepath, boxes=boxes, role=role)]
    return [Reference(sample.filepath, box=box, role=role) for box in boxes]


def _box_of(detection: fo.Detection, label_field: str, size: tuple[int, int]) -> Box:
    """Return the box of a detection in pixels (x1, y1, x2, y2).

    Raises:
        ValueError: If the box has no extent or lies outside the image.
    """
    box = list(detection.bounding_box or ())
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        raise ValueError(
            f"a box in {label_field!r} has no extent ({box}); use [x, y, width, height] relative to the image, "
            "with positive width and height."
        )
    if max(box[:2]) >= 1 or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        raise ValueError(
            f"a box in {label_field!r} lies outside the image ({box}); use coordinates relative to it, from 0 to 1."
        )
    return pixel_box(box, size)


def _check(reference: Reference) -> None:
    """Check a reference by reading it as the processor does.

    Raises:
        ValueError: If it cannot be used.
    """
    try:
        resolve_references([replace(reference, role="support")])
    except (ValueError, OSError) as error:
        raise ValueError(str(error).removeprefix("reference 0: ")) from error
