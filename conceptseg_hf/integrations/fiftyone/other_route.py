"""Segment samples again by the route that the router did not take, to compare the masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import fiftyone as fo
from fiftyone import ViewField as F

from .job import SegmentationJob
from .loop import pending_ids, segment_collection
from .progress import Progress
from .schema import other_route_field

_SAM_ONLY_ROUTES = ("shortcut", "concept")


def segment_other_route(
    samples: fo.core.collections.SampleCollection, field: str = "concept"
) -> Iterator[Progress]:
    """Segment samples again by the route that their predictions did not take; yield the progress.

    The prompt, references and checkpoint are those of each prediction. The results are written to
    `other_route_field(field)` and cleared when the prediction is replaced; samples that have a result are skipped.

    Args:
        samples: Dataset or view.
        field: Field with predictions of `segment_collection`.

    Yields:
        The `Progress` over all samples.

    Raises:
        ValueError: If the field has no such predictions, or a run cannot be repeated.
    """
    keys = sorted(filter(None, samples.distinct(f"{field}.run"))) if samples.has_field(f"{field}.run") else []
    if not keys:
        raise ValueError(
            f"field {field!r} holds no predictions of segment_concept, so there is no run to repeat; "
            "use another field, or run segment_concept first."
        )
    dataset, parts = samples._dataset, []
    for key in keys:
        original = SegmentationJob.load(dataset, key)
        by_sam = F(f"{field}.route").is_in(_SAM_ONLY_ROUTES)
        by_vlm = (F(f"{field}.route") != None) & ~by_sam  # noqa: E711 (FiftyOne expression)
        for taken, router in ((by_sam, "full_reasoning"), (by_vlm, "sam_only")):
            job = replace(
                original,
                field=other_route_field(field),
                prompt=None,
                prompt_field=f"{field}.prompt",
                router=router,
                outputs=("segmentation",),
                skip_existing=True,
            )
            parts.append((samples.match((F(f"{field}.run") == key) & taken), job))
    pending = sum(len(pending_ids(view, job)) for view, job in parts)
    total = Progress(total=pending, skipped=sum(view.count() for view, _ in parts) - pending)
    yield total
    for view, job in parts:
        part = Progress(total=0)
        for part in segment_collection(view, job) if pending_ids(view, job) else ():
            yield total.plus(part)
        total = total.plus(part)
        if total.cancelled:
            return
