"""Foreground IoU of several evaluations of the benchmark "photos", by dataset, with 95 % bootstrap intervals.

    python benchmarks/photos_table.py otsu=baselines/otsu unet=unet/evaluation mini=evaluation_output/photos
    python benchmarks/photos_table.py otsu=baselines/otsu --exclude duplicates.csv

Each evaluation is NAME=FOLDER, where FOLDER is an output folder of `conceptseg evaluate` or `evaluate_masks`.
`--exclude` takes a file of `conceptseg data check photos --duplicates FILE`. A dataset with two levels has two rows;
CamVid also has rows for its classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from conceptseg_hf.data.duplicates import read_sample_ids
from conceptseg_hf.evaluation.records.runs import read_runs
from conceptseg_hf.evaluation.reporting.bootstrap import resample
from conceptseg_hf.evaluation.reporting.tables import interval_text, markdown_table

BY_PROMPT = ("camvid",)
Row = tuple[str, str]


def rows_of(record: dict) -> Iterable[Row]:
    """The rows that a record belongs to: a dataset with its level, and its class."""
    yield record["dataset"], record["level"]
    if record["dataset"] in BY_PROMPT:
        yield f"{record['dataset']}: {record['prompt']}", record["level"]


def read_ious(folder: str, excluded: frozenset[str]) -> dict[Row, list[float]]:
    """Foreground IoUs by row."""
    ious: dict[Row, list[float]] = {}
    for run in read_runs(folder).values():
        for record in run.records.values():
            if (
                record["sample_id"] not in excluded
                and record["present"]
                and record["foreground_iou"] is not None
            ):
                for row in rows_of(record):
                    ious.setdefault(row, []).append(record["foreground_iou"])
    return ious


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--exclude", metavar="FILE", help="samples to leave out")
    arguments = parser.parse_args(argv)
    excluded = frozenset(() if arguments.exclude is None else read_sample_ids(arguments.exclude))
    columns: dict[str, dict[Row, list[float]]] = {}
    for text in arguments.evaluations:
        name, separator, folder = text.partition("=")
        if not separator:
            parser.error(f"{text!r} is not NAME=FOLDER")
        columns[name] = read_ious(folder, excluded)
    rows = sorted({row for ious in columns.values() for row in ious}, key=lambda row: (row[1], row[0]))
    lines = []
    for row in rows:
        values = [ious.get(row, []) for ious in columns.values()]
        cells = []
        for numbers in values:
            resampled = resample(numbers, "/".join(row))
            if resampled is None:
                cells.append("-")
            elif len(numbers) < 2:
                cells.append(f"{resampled.mean:.3f}")
            else:
                cells.append(interval_text(resampled.interval(), 3))
        lines.append([row[1], row[0], str(max(map(len, values))), *cells])
    print("\n".join(markdown_table(["level", "dataset", "samples", *columns], lines)))


if __name__ == "__main__":
    main()
