"""Shares and foreground IoUs of the tiers that a concept has: SAM 3 alone, its rule, and full reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records.store import Record
from .bootstrap import foreground_iou

TIERS = ("concept", "rule", "reasoning")


def tier_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a row per tier that was taken; empty if no sample was segmented with a concept or a given rule.

    A row has `tier`, `samples`, `share` (of the samples with a result), `foreground_iou` (mean over the samples that
    show their concept, or None) and `foreground_iou_interval` (low, high), or None.
    """
    routes = [record["route"] for record in records if record["route"] is not None]
    if not {"concept", "rule"} & set(routes):
        return []
    rows = []
    for tier in TIERS:
        members = [record for record in records if record["route"] == tier]
        if not members:
            continue
        mean, interval = foreground_iou(members, stream=f"tier/{tier}")
        rows.append(
            {
                "tier": tier,
                "samples": len(members),
                "share": len(members) / len(routes),
                "foreground_iou": mean,
                "foreground_iou_interval": interval,
            }
        )
    return rows


def tier_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table of tiers."""
    cells = []
    for row in rows:
        iou, bounds = row["foreground_iou"], row["foreground_iou_interval"]
        text = "-" if iou is None else f"{iou:.3f}"
        text += "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
        cells.append([row["tier"], str(row["samples"]), f"{100 * row['share']:.1f}", text])
    return cells
