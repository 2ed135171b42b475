"""Notes on the data in a report: ground truth masks of another size than their image, and unusable references.

Datasets with neither are not mentioned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..records.store import Record

_MAX_LISTED_REFERENCES = 20


def data_notes(records: Sequence[Record]) -> dict[str, Any]:
    """Return the notes as JSON values, under `gt_masks_of_another_size` and `unusable_references` where they apply."""
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
    """Return the notes as lines of Markdown."""
    notes = data_notes(records)
    lines: list[str] = []
    if sized := notes.get("gt_masks_of_another_size"):
        counts = (
            f"{sized['resized']} resized to it, {sized['failed']} counted as failed (another aspect ratio)"
        )
        lines += ["", f"Ground truth masks of another size than their image: {counts}."]
    if unusable := notes.get("unusable_references"):
        faults = unusable["faults"]
        summary = (
            f"References that cannot be used: {len(faults)}, drawn for {unusable['samples']} samples. They were "
            f"replaced by others of their class; {unusable['samples_with_fewer']} samples had fewer references."
        )
        lines += [
            "",
            summary,
            "",
            *(f"- {entry['fault']}" for entry in faults[:_MAX_LISTED_REFERENCES]),
        ]
        if len(faults) > _MAX_LISTED_REFERENCES:
            lines.append(f"- and {len(faults) - _MAX_LISTED_REFERENCES} more; report.json has them all.")
    return lines
