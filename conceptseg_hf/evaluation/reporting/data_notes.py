"""What a report says of the data: true masks of another size than their image, and references that cannot be used.

A data set without either is not mentioned at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..records.store import Record

_LISTED = 20  # references in a report


def data_notes(records: Sequence[Record]) -> dict[str, Any]:
    """As JSON values, under the keys `gt_masks_of_another_size` and `unusable_references`, each if there are any."""
    notes: dict[str, Any] = {}
    resized = sum("mask_resized_from" in record for record in records)
    failed = sum("mask_refused" in record for record in records)
    if resized or failed:
        notes["gt_masks_of_another_size"] = {"resized": resized, "failed": failed}
    faults = Counter(
        fault for record in records for fault in dict.fromkeys(record.get("reference_faults", ()))
    )
    if faults:
        notes["unusable_references"] = {
            "samples": sum(bool(record.get("reference_faults")) for record in records),
            "samples_with_fewer": sum(bool(record.get("references_lost")) for record in records),
            "faults": [{"fault": fault, "samples": count} for fault, count in faults.most_common()],
        }
    return notes


def data_remarks(records: Sequence[Record]) -> list[str]:
    """The same as lines of Markdown."""
    notes = data_notes(records)
    lines: list[str] = []
    if sized := notes.get("gt_masks_of_another_size"):
        counts = (
            f"{sized['resized']} resized to it, {sized['failed']} counted as failed (another aspect ratio)"
        )
        lines += ["", f"True masks of another size than their image: {counts}."]
    if found := notes.get("unusable_references"):
        faults = found["faults"]
        notified = (
            f"References that cannot be used: {len(faults)}, drawn for {found['samples']} samples. Others of their "
            f"class took their places; {found['samples_with_fewer']} samples had fewer references."
        )
        lines += [
            "",
            notified,
            "",
            *(f"- {entry['fault']}" for entry in faults[:_LISTED]),
        ]
        if len(faults) > _LISTED:
            lines.append(f"- and {len(faults) - _LISTED} more; report.json has them all.")
    return lines
