"""Tables of paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from conceptseg_hf.evaluation.reporting.bootstrap import Interval, resample
from conceptseg_hf.evaluation.reporting.tables import interval_text

from .measuring import MEASURES, Values


def paired(values: Sequence[float | None], baseline: Sequence[float | None], stream: str) -> Interval | None:
    """Compute the mean difference of two runs on the same samples, with its 95 % bootstrap interval.

    Args:
        values: One value per sample; samples without a value in both runs are skipped.
        baseline: The values of the other run.
        stream: Name of the random stream.

    Returns:
        The interval; None if there is no pair.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True) if a is not None and b is not None]
    resampled = resample(differences, stream)
    return None if resampled is None else resampled.interval()


def mean_over_seeds(runs: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Return the mean of each sample's values over seeds; None if a seed has no value."""
    means: list[float | None] = []
    for sample_values in zip(*runs, strict=True):
        known = [value for value in sample_values if value is not None]
        means.append(float(np.mean(known)) if len(known) == len(sample_values) else None)
    return means


def comparison_table(
    results: Mapping[str, Sequence[Mapping[str, Values]]],
    baseline: str,
    titles: Mapping[str, str],
    source: str,
    measures: Sequence[str] = MEASURES,
    compared: Sequence[str] = ("mask_iou", "box_iou"),
) -> str:
    """Format a Markdown table with one row per arm: means over seeds, and differences from the baseline.

    Args:
        results: For each arm, the results of `measure` of its seeds.
        baseline: The arm that the others are compared with.
        titles: The arms' titles.
        source: Evaluation set and decoding, a key of the results.
        measures: Measures to show.
        compared: Measures whose differences are shown.
    """
    title = titles[baseline]
    heading = ["arm", "seeds", *measures]
    heading += [f"{name.replace('_iou', ' IoU')} - {title}" for name in compared]
    rows = []
    reference = {name: mean_over_seeds([run[source][name] for run in results[baseline]]) for name in measures}
    for arm, runs in results.items():
        values = {name: mean_over_seeds([run[source][name] for run in runs]) for name in measures}
        cells = [titles[arm], str(len(runs)), *(format_mean(values[name]) for name in measures)]
        for name in compared:
            interval = (
                None if arm == baseline else paired(values[name], reference[name], f"{arm}/{source}/{name}")
            )
            cells.append(interval_text(interval, 3, signed=True))
        rows.append(cells)
    return plain_table(heading, rows)


def families_table(
    results: Mapping[str, Sequence[Mapping[str, Values]]],
    baseline: str,
    titles: Mapping[str, str],
    source: str,
    families: Sequence[str],
    left_out: str | None = None,
    measure: str = "mask_iou",
) -> str:
    """Format a Markdown table with one row per family of tasks: means over seeds, and differences from the baseline.

    Args:
        results: For each arm, the results of `measure` of its seeds.
        baseline: The arm that the others are compared with.
        titles: The arms' titles.
        source: Evaluation set and decoding, a key of the results.
        families: The family of each sample of the set.
        left_out: Family without which all others are averaged in the last row; None for no such row.
        measure: The measure to show.
    """
    names = sorted(set(families))
    groups = {name: {name} for name in names}
    if left_out is not None:
        groups[f"all without {left_out}"] = set(names) - {left_out}
    values = {arm: mean_over_seeds([run[source][measure] for run in runs]) for arm, runs in results.items()}
    rows = []
    for family, members in groups.items():
        indices = [i for i, name in enumerate(families) if name in members]
        reference = [values[baseline][i] for i in indices]
        cells = [family, str(len(indices))]
        for arm, arm_values in values.items():
            selected = [arm_values[i] for i in indices]
            interval = (
                None if arm == baseline else paired(selected, reference, f"{arm}/{source}/{measure}/{family}")
            )
            cells.append(
                format_mean(selected)
                + ("" if interval is None else f", {interval_text(interval, 3, signed=True)}")
            )
        rows.append(cells)
    return plain_table(["family", "n", *(titles[arm] for arm in values)], rows)


def plain_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; its columns are not aligned, since intervals would make them wide."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heading, *rows)]
    return "\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]])


def format_mean(values: Sequence[float | None]) -> str:
    """Format the mean of the known values; "-" if there are none."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else "-"
