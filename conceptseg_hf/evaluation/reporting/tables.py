"""Formatting of tables and numbers as Markdown and CSV, and of their provenance."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from .bootstrap import Interval

HEADINGS = {
    "f_w": "F_w",
    "miou": "mIoU",
    "giou": "gIoU",
    "ciou": "cIoU",
    "mae": "MAE",
    "ber": "BER",
    "s_measure": "S-measure",
    "mdice": "mDice",
}
LOWER_IS_BETTER = ("mae", "ber")


def heading_of(metric: str) -> str:
    """Return the heading of a metric in tables."""
    return HEADINGS[metric] + (" (lower is better)" if metric in LOWER_IS_BETTER else "")


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table with aligned columns; vertical bars in cells are escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heading, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(heading))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with the same keys as CSV; None becomes an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def percent(value: float | None, digits: int = 1) -> str:
    """Format a number that is already a percentage."""
    return "-" if value is None else f"{value:.{digits}f}"


def fraction(value: float | None) -> str:
    """Format a number in [0, 1], or a count."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def interval_text(interval: Interval | None, digits: int = 1, signed: bool = False) -> str:
    """Format a mean with its interval, such as "81.2 [79.0, 83.3]"."""
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    low, high = (f"{value:{sign}.{digits}f}" for value in (interval.low, interval.high))
    return f"{interval.mean:{sign}.{digits}f} [{low}, {high}]"


def interval_values(interval: Interval | None) -> dict[str, Any] | None:
    """Return an interval as JSON values."""
    if interval is None:
        return None
    return {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "samples": interval.samples,
    }


def provenance(settings: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Return the settings that identify a result: benchmark, split, seed, protocol, profile, router, checkpoint, etc.

    Args:
        settings: The settings of a run.
        samples: Number of samples.
    """
    names = ("benchmark", "split", "seed", "protocol", "router", "sam_prompt", "max_references", "generation")
    values = {name: settings.get(name) for name in names}
    for name in ("profile", "excluded"):
        if name in settings:
            values[name] = settings[name]
    return values | {
        "checkpoint": checkpoint_name(settings),
        "weights": settings.get("weights"),
        "samples": samples,
    }


def provenance_line(settings: Mapping[str, Any], samples: int) -> str:
    """Format `provenance` as one line; unset and default values are omitted."""
    values = provenance(settings, samples)
    if values["sam_prompt"] == "concept+text":
        del values["sam_prompt"]
    weights = values.pop("weights")
    if weights:
        values["checkpoint"] = f"{values['checkpoint']} (weights {weights})"
    values["n"] = values.pop("samples")
    parts = (f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value not in (None, ""))
    return ", ".join(parts) + "."


def checkpoint_name(settings: Mapping[str, Any]) -> str:
    """Return the hub id of a checkpoint, or the name of its folder."""
    name = str(settings.get("model") or "")
    path = PurePath(name)
    return (name if len(path.parts) <= 2 and not path.is_absolute() else path.name) or "in memory"
