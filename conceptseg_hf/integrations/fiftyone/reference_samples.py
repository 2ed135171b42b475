"""References that are samples of a dataset: their boxes or masks, as the processor takes them."""

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
"""Labels that can mark the concept in a reference."""

AUTO = "auto"
"""In place of a field that marks the concept: the likeliest of the dataset."""


def reference_label_fields(samples: fo.core.collections.SampleCollection) -> list[str]:
    """The fields that can mark a concept, the likeliest first."""
    names = fields_of_type(samples, *BOX_TYPES)
    return sorted(names, key=lambda name: (name != REFERENCE_BOXES, name != GROUND_TRUTH))


def resolve_label_field(
    samples: fo.core.collections.SampleCollection, chosen: str | None, ids: Sequence[str] = ()
) -> str | None:
    """The field that marks the concept: as chosen, or the likeliest for `AUTO`; None if there is none.

    Of itself it takes no predictions: what a run writes must not become its own references.

    Args:
        samples: A dataset or view.
        chosen: A field, `AUTO` or None.
        ids: The references, where they are known: the likeliest field is then the first that marks the most of them.
    """
    if chosen != AUTO:
        return chosen
    predictions = prediction_fields(samples)
    names = [name for name in reference_label_fields(samples) if name not in predictions]
    if len(names) > 1 and ids:
        counts = {name: count_marked(samples, ids, name) for name in names}
        return max(names, key=lambda name: counts[name])  # the first of equals
    return names[0] if names else None


def count_marked(samples: fo.core.collections.SampleCollection, ids: Sequence[str], label_field: str) -> int:
    """How many of the samples of these ids have a box or mask in a field; only the first that fit are looked at."""
    valid = [sample_id for sample_id in ids if ObjectId.is_valid(sample_id)][: MAX_REFERENCES + 1]
    shown = whole_dataset(samples).select(valid).select_fields(label_field)
    return sum(has_marks(sample, label_field) for sample in shown)


def references_from(
    samples: Iterable[fo.Sample],
    label_field: str | None = None,
    proxy: bool = True,
    unmarked: bool = False,
    label_ids: Collection[str] = (),
    boxes_together: bool = False,
) -> list[Reference]:
    """Samples as references.

    Args:
        samples: The samples, in order.
        label_field: The field of boxes (`Detections`, `Detection`) or masks (`Segmentation`) that mark the concept;
            None: the images alone. A sample with several boxes gives several references, but see `boxes_together`.
        proxy: Withhold the box of the first, so that the model checks its rule on it.
        unmarked: Show a sample without box or mask in that field as an image alone, rather than raise.
        label_ids: Ids of the `Detections` that count; all by default.
        boxes_together: Make one reference of a sample with several boxes, which are all drawn in its picture.

    Raises:
        ValueError: If a sample cannot be a reference: it has no box or mask in that field (unless `unmarked`), a box
            without extent or outside the image, an empty mask, one of several classes or of another size, or a file
            that cannot be read; or if there are more than nine references.
    """
    references: list[Reference] = []
    role: Role = "auto" if proxy else "support"
    for sample in samples:
        try:
            found = _marked(sample, label_field, role, label_ids, boxes_together)
        except (ValueError, OSError) as error:
            raise ValueError(f"reference {sample.filename!r} cannot be used: {error}") from error
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


def check_references(references: Sequence[Reference]) -> None:
    """Finds references that would make every sample fail.

    Raises:
        ValueError: If one cannot be read, or its box or mask marks nothing; its file is named.
    """
    for index, reference in enumerate(references):
        try:
            _check(reference)
        except ValueError as error:
            path = reference.image if isinstance(reference.image, (str, os.PathLike)) else None
            name = index if path is None else repr(Path(path).name)
            raise ValueError(f"reference {name} cannot be used: {error}") from error


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


def _marked(
    sample: fo.Sample, label_field: str | None, role: Role, label_ids: Collection[str], boxes_together: bool
) -> list[Reference]:
    """What marks the concept in a sample; nothing, if it has no mark.

    Raises:
        ValueError: If the image or a mark cannot be used.
        OSError: If a file is lost.
    """
    image = load_image(sample.filepath)
    if label_field is None or not has_marks(sample, label_field):
        return []
    label = sample[label_field]
    if isinstance(label, fo.Segmentation):
        load_gt_mask(label)  # several classes would teach the wrong concept
        _check(Reference(image, mask=mask_of(label)))
        return [Reference(sample.filepath, mask=mask_of(label), role=role)]
    detections = label.detections if isinstance(label, fo.Detections) else [label]
    counted = [detection for detection in detections if not label_ids or detection.id in label_ids]
    limit = None if boxes_together else MAX_REFERENCES + 1
    boxes = [_box_of(detection, label_field, image.size) for detection in counted[:limit]]
    for box in boxes:
        _check(Reference(image, box=box))
    if boxes_together and len(boxes) > 1:
        return [Reference(sample.filepath, boxes=boxes, role=role)]
    return [Reference(sample.filepath, box=box, role=role) for box in boxes]


def _box_of(detection: fo.Detection, label_field: str, size: tuple[int, int]) -> Box:
    """The box in pixels (x1, y1, x2, y2).

    Raises:
        ValueError: If it marks nothing in the image.
    """
    box = list(detection.bounding_box or ())
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        raise ValueError(
            f"a box in {label_field!r} has no extent ({box}); give [x, y, width, height] relative to the image, with "
            "width and height above 0."
        )
    if max(box[:2]) >= 1 or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
        raise ValueError(
            f"a box in {label_field!r} lies outside the image ({box}); give it relative to the image, within 0 to 1."
        )
    return pixel_box(box, size)


def _check(reference: Reference) -> None:
    """Reads a reference as the processor will.

    Raises:
        ValueError: If it cannot be used.
    """
    try:
        resolve_references([replace(reference, role="support")])
    except (ValueError, OSError) as error:
        raise ValueError(str(error).removeprefix("reference 0: ")) from error
