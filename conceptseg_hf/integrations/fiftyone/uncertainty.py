"""What a curator should look at first."""

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
"""Tag of each reason."""


def find_uncertain(
    samples: fo.core.collections.SampleCollection,
    field: str = "concept",
    margin: float = 0.1,
    check_iou: float = 0.5,
    other_field: str | None = None,
    routes_iou: float = 0.5,
    tag: bool = True,
) -> dict[str, list[str]]:
    """Finds the samples whose predictions deserve a look.

    Args:
        samples: A dataset or view.
        field: The predictions.
        margin: A presence is near the router's threshold when they differ by at most this.
        check_iou: A check failed when its IoU with the withheld box is below this.
        other_field: Predictions of another route, to compare masks with: those of `segment_other_route`, or of a second
            run. Both fields then hold a `Segmentation`.
        routes_iou: Routes disagree when the IoU of their masks is below this.
        tag: Tag the samples with `TAGS`; tags of an earlier search are removed from the whole dataset first.

    Returns:
        Sample ids by reason: "presence", "check", "routes" (with `other_field`) and "error", which masks that cannot be
        compared (a lost file, another size) count as, too.

    Raises:
        ValueError: If a field is missing, or holds no masks to compare.
    """
    for name in filter(None, (field, other_field)):
        check_predictions(samples, name, with_masks=other_field is not None)
    presence, threshold = F(f"{field}.presence"), F(f"{field}.threshold")
    known = samples.match((presence != None) & (threshold != None))  # noqa: E711 (expressions of FiftyOne)
    checked = samples.match(F(f"{field}.check_iou") != None)  # noqa: E711
    found = {
        "presence": known.match((presence - threshold).abs() <= margin).values("id"),
        "check": checked.match(F(f"{field}.check_iou") < check_iou).values("id"),
        "error": samples.match(F(f"{field}.error") != None).values("id"),  # noqa: E711
    }
    if other_field is not None:
        found["routes"], unread = _compare(samples, field, other_field, routes_iou)
        found["error"] = list(dict.fromkeys([*found["error"], *unread]))
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
    """Finds a field that cannot be searched.

    Raises:
        ValueError: If it holds no predictions of ConceptSeg, or no masks where they are wanted.
    """
    if not samples.has_field(f"{field}.presence"):
        raise ValueError(
            f"field {field!r} holds no predictions of ConceptSeg; run segment_concept first, or give another field."
        )
    if with_masks and field not in fields_of_type(samples, fo.Segmentation):
        raise ValueError(
            f"field {field!r} holds no Segmentation, so routes cannot be compared; give one that does."
        )


def _compare(
    samples: fo.core.collections.SampleCollection, field: str, other_field: str, iou: float
) -> tuple[list[str], list[str]]:
    """Ids of the samples whose masks differ, and of those whose masks cannot be compared."""
    differ, unread = [], []
    for sample in samples.exists(field).exists(other_field).select_fields([field, other_field]):
        try:
            if _masks_differ(sample[field], sample[other_field], iou):
                differ.append(sample.id)
        except (ValueError, OSError):  # a lost file, or masks of different sizes
            unread.append(sample.id)
    return differ, unread


def _masks_differ(first: fo.Segmentation, second: fo.Segmentation, iou: float) -> bool:
    masks = [predicted_mask(label) for label in (first, second)]
    if any(mask is None for mask in masks):
        return False  # an error, which is a reason of its own
    return foreground_iou(*map(load_mask, masks)) < iou
