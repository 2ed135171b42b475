"""How well the positional prior of CoPRS points at the target, and how its quality is related to that of the mask.

The second is research question 2 of the CoPRS paper: the correlation of prior and mask over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..metrics.heatmaps import HEATMAP_METRICS
from ..records.store import Record
from .aggregate import levels_of
from .bootstrap import Interval, correlation_interval, resample
from .tables import interval_text, interval_values, markdown_table

_HEADINGS = {
    "iou": "prior IoU",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "share": "share among siblings",
}
_CORRELATED = ("iou", "average_precision", "auroc")

_MEANINGS = {
    "iou": "prior IoU: of the prior with a threshold of 0.5, before SAM decodes it.",
    "auroc": "AUROC, average precision: over the pixels of a sample, without a threshold.",
    "share": "share among siblings: fraction of the prior's sum over target and siblings that is on the target.",
}

Records = Sequence[Record]


def prior_rows(records: Records) -> list[dict[str, Any]]:
    """Return one row per level, per group with strata, and for all samples; no rows without priors.

    A row holds `level`, `group`, `samples` (with a prior and their concept), the mean with its interval of each metric,
    and `correlation`: by metric, Pearson's correlation with the foreground IoU of the mask, with its interval.
    """
    shown = [record for record in records if record.get("prior") is not None and record["present"]]
    if not shown:
        return []
    rows = []
    for level in levels_of(shown):
        members = [record for record in shown if record["level"] == level]
        with_strata = dict.fromkeys(record["group"] for record in members if record.get("stratum"))
        rows.append(_row(level, "all", members))
        rows += [_row(level, group, [r for r in members if r["group"] == group]) for group in with_strata]
    return [*rows, _row("all", "all", shown)]


def prior_section(records: Records) -> list[str]:
    """Return the tables of `prior_rows` as lines of Markdown; none without priors."""
    rows = prior_rows(records)
    if not rows:
        return []
    metrics = [name for name in HEATMAP_METRICS if any(row["intervals"][name] is not None for row in rows)]
    quality = [
        [row["level"], row["group"], str(row["samples"]), *(_cell(row["intervals"][m]) for m in metrics)]
        for row in rows
    ]
    related = [
        [
            row["level"],
            row["group"],
            str(row["samples"]),
            *(_cell(row["correlations"][m]) for m in _CORRELATED),
        ]
        for row in rows
    ]
    names = [_HEADINGS[name] for name in metrics]
    return [
        *markdown_table(["level", "group", "samples", *names], quality),
        "",
        "Pearson's correlation with the foreground IoU of the mask, over samples:",
        "",
        *markdown_table(["level", "group", "samples", *(_HEADINGS[name] for name in _CORRELATED)], related),
        "",
        "- samples: those that show their concept, without failed ones.",
        *(f"- {meaning}" for name, meaning in _MEANINGS.items() if name in metrics),
        "- Intervals: 95 %, by bootstrap over the samples.",
    ]


def prior_dict(records: Records) -> list[dict[str, Any]]:
    """Return `prior_rows` as JSON values."""
    return [
        {
            **row,
            "intervals": {name: interval_values(value) for name, value in row["intervals"].items()},
            "correlations": {name: interval_values(value) for name, value in row["correlations"].items()},
        }
        for row in prior_rows(records)
    ]


def _row(level: str, group: str, records: Records) -> dict[str, Any]:
    stream = f"prior/{level}/{group}"
    intervals: dict[str, Interval | None] = {}
    for metric in HEATMAP_METRICS:
        values = [value for record in records if (value := record["prior"].get(metric)) is not None]
        resampled = resample(values, f"{stream}/{metric}")
        intervals[metric] = None if resampled is None else resampled.interval()
    ious = [record["foreground_iou"] for record in records]
    return {
        "level": level,
        "group": group,
        "samples": len(records),
        "intervals": intervals,
        "correlations": {
            metric: correlation_interval(
                [record["prior"].get(metric) for record in records], ious, f"{stream}/r/{metric}"
            )
            for metric in _CORRELATED
        },
    }


def _cell(interval: Interval | None) -> str:
    return interval_text(interval, 3)


__all__ = ["prior_dict", "prior_rows", "prior_section"]
