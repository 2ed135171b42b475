"""Find uncertain predictions, which should be reviewed first."""

from __future__ import annotations

import fiftyone as fo
from fiftyone import ViewField as F

from ...evaluation.metrics import foreground_iou
from ...images import load_mask
from .labels import predicted_mask
from .schema import fields_of_type, whole_dataset

TAGS = {
    "presence": "uncertain: presence near threshold",
    "check": "uncertain: check failed",
    "routes": "uncertain: routes disagree",
    "error": "uncertain: error",
}
"""Sample tag for each reason."""


def find_uncertain(
    samples: fo.core.collections.SampleCollection,
    field: str = "concept",
    margin: float = 0.1,
    check_iou: float = 0.5,
    other_field: str | None = None,
    routes_iou: float = 0.5,
    tag: bool = True,
) -> dict[str, list[str]]:
    """Find samples with uncertain predictions.

    Args:
        samples: Dataset or view.
        field: Field of the predictions.
        margin: Maximum difference of presence and router threshold at which a sample is uncertain.
        check_iou: Minimum IoU of the check with the withheld box; a check with a lower IoU has failed.
        other_field: Field with masks of the other route to compare: the output of `segment_other_route`, or of a second
            run. Both fields must then hold a `Segmentation`.
        routes_iou: Minimum IoU of the masks of both routes; routes with a lower IoU disagree.
        tag: Whether to tag the samples with `TAGS`; tags of an earlier search are first removed from the whole dataset.

    Returns:
        Sample ids by reason: "presence", "check", "routes" (with `other_field`) and "error", which includes masks that
        cannot be compared (a missing file, different sizes).

    Raises:
        ValueError: If a field is missing or holds no masks to compare.
    """
    for name in filter(None, (field, other_field)):
        check_predictions(samples, name, with_masks=other_field is not None)
    presence, threshold = F(f"{field}.presence"), F(f"{field}.threshold")
    known = samples.match((presence != None) & (threshold != None))  # noqa: E711 (FiftyOne expressions)
    checked = samples.match(F(f"{field}.check_iou") != None)  # noqa: E711
    found = {
        "presence": known.match((presence - threshold).abs() <= margin).values("id"),
        "check": checked.match(F(f"{field}.check_iou") < check_iou).values("id"),
        "error": samples.match(F(f"{field}.error") != None).values("id"),  # noqa: E711
    }
    if other_field is not None:
        found["routes"], not_comparable = _compare(samples, field, other_field, routes_iou)
        found["error"] = list(dict.fromkeys([*found["error"], *not_comparable]))
    if tag:
        dataset = whole_dataset(samples)
        dataset.untag_samples(list(TAGS.values()))
        for reason, ids in found.items():
            if ids:
                dataset.select(ids).tag_samples(TAGS[reason])
    return found


def check_predictions(
    samples: fo.core.collections.SampleCollection, field: str, with_masks: bool = False
) -> None:
    """Check that a field can be searched for uncertain predictions.

    Raises:
        ValueError: If it holds no predictions of ConceptSeg, or no masks although `with_masks` is set.
    """
    if not samples.has_field(f"{field}.presence"):
        raise ValueError(
            f"field {field!r} holds no predictions of ConceptSeg; run segment_concept first, or use another field."
        )
    if with_masks and field not in fields_of_type(samples, fo.Segmentation):
        raise ValueError(
            f"field {field!r} holds no Segmentation, so routes cannot be compared; use a field that does."
        )


def _compare(
    samples: fo.core.collections.SampleCollection, field: str, other_field: str, iou: float
) -> tuple[list[str], list[str]]:
    """Return the ids of the samples with different masks, and of those with masks that cannot be compared."""
    differ, not_comparable = [], []
    for sample in samples.exists(field).exists(other_field).select_fields([field, other_field]):
        try:
            if _masks_differ(sample[field], sample[other_field], iou):
                differ.append(sample.id)
        except (ValueError, OSError):  # a missing file, or masks of different sizes
            not_comparable.append(sample.id)
    return differ, not_comparable


def _masks_differ(first: fo.Segmentation, second: fo.Segmentation, iou: float) -> bool:
    masks = [predicted_mask(label) for label in (first, second)]
    if any(mask is None for mask in masks):
        return False  # a prediction with an error is reported under "error"
    return foreground_iou(*map(load_mask, masks)) < iou
