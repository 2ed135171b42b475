"""Foreground IoU of several evaluations of the benchmark `photos`, by dataset."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from conceptseg_hf.evaluation.records.runs import read_runs
from conceptseg_hf.evaluation.reporting.bootstrap import resample
from conceptseg_hf.evaluation.reporting.tables import interval_text, markdown_table

_BY_PROMPT = ("camvid",)

Row: TypeAlias = tuple[str, str]
"""Level and dataset, or level and "dataset: class"."""

Ious: TypeAlias = Mapping[Row, Mapping[str, float]]
"""Foreground IoUs by row and sample id."""


def read_ious(folder: str | os.PathLike, excluded: Collection[str] = ()) -> Ious:
    """Read the foreground IoUs of the samples that show their concept.

    Args:
        folder: Output folder of `conceptseg evaluate` or `evaluate_masks`.
        excluded: Ids of samples that are left out.

    Returns:
        IoUs by row. A dataset with two levels has two rows; CamVid also has rows for its classes.

    Raises:
        FileNotFoundError: If the folder holds no evaluation.
    """
    ious: dict[Row, dict[str, float]] = {}
    for run in read_runs(folder).values():
        for record in run.records.values():
            iou = record["foreground_iou"]
            if record["sample_id"] not in excluded and record["present"] and iou is not None:
                for row in _rows_of(record):
                    ious.setdefault(row, {})[record["sample_id"]] = iou
    return ious


def named_folder(text: str) -> tuple[str, str]:
    """Parse NAME=FOLDER of a command line.

    Raises:
        argparse.ArgumentTypeError: If there is no name or no folder.
    """
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def _rows_of(record: Mapping[str, Any]) -> Iterator[Row]:
    yield record["level"], record["dataset"]
    if record["dataset"] in _BY_PROMPT:
        yield record["level"], f"{record['dataset']}: {record['prompt']}"


def dataset_table(columns: Mapping[str, Ious], differences: bool = False) -> list[str]:
    """Return a Markdown table with datasets in rows and evaluations in columns: means with 95 % bootstrap intervals.

    Args:
        columns: IoUs by the name of the evaluation.
        differences: Add the paired differences of the first evaluation to each other one.
    """
    first, *others = columns
    headings = ["level", "dataset", "samples", *columns]
    if differences:
        headings += [f"{first} - {name}" for name in others]
    lines = []
    for row in sorted({row for ious in columns.values() for row in ious}):
        values = {name: ious.get(row, {}) for name, ious in columns.items()}
        cells = [_cell(list(each.values()), row) for each in values.values()]
        if differences:
            cells += [_cell(_paired(values[first], values[name]), row, signed=True) for name in others]
        lines.append([*row, str(max(map(len, values.values()))), *cells])
    return markdown_table(headings, lines)


def _paired(first: Mapping[str, float], second: Mapping[str, float]) -> list[float]:
    return [value - second[sample] for sample, value in first.items() if sample in second]


def _cell(values: list[float], row: Row, signed: bool = False) -> str:
    resampled = resample(values, "/".join(reversed(row)))
    if resampled is None:
        return "-"
    if len(values) < 2:
        return f"{resampled.mean:{'+' if signed else ''}.3f}"
    return interval_text(resampled.interval(), 3, signed)
