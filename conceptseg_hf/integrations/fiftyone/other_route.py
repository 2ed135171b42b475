"""The route that the router did not take: would it have found the same mask?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import fiftyone as fo
from fiftyone import ViewField as F

from .job import SegmentationJob
from .loop import pending_ids, segment_collection
from .progress import Progress
from .schema import other_route_field

_OTHER = {"shortcut": "full_reasoning", "reasoning": "sam_only"}
"""Route that was taken, and the router mode that takes the other."""


def segment_other_route(
    samples: fo.core.collections.SampleCollection, field: str = "concept"
) -> Iterator[Progress]:
    """Segments samples anew by the route that their predictions did not take; yields progress as it goes.

    Prompt, references and checkpoint are those of each prediction. What is written to `other_route_field(field)` stays
    valid until the prediction itself is made anew; samples that have it are left out.

    Args:
        samples: A dataset or view.
        field: Predictions of `segment_collection`.

    Raises:
        ValueError: If there are no such predictions, or a run cannot be repeated.
    """
    keys = sorted(filter(None, samples.distinct(f"{field}.run"))) if samples.has_field(f"{field}.run") else []
    if not keys:
        raise ValueError(
            f"field {field!r} holds no predictions of segment_concept, so it is not known what to repeat; "
            "give another field, or segment the samples with it."
        )
    dataset, parts = samples._dataset, []
    for key in keys:
        made = SegmentationJob.load(dataset, key)
        for route, router in _OTHER.items():
            job = replace(
                made,
                field=other_route_field(field),
                prompt=None,
                prompt_field=f"{field}.prompt",
                router=router,
                outputs=("segmentation",),
                skip_existing=True,
            )
            parts.append((samples.match((F(f"{field}.run") == key) & (F(f"{field}.route") == route)), job))
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
