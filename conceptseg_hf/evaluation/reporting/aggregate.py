"""Aggregation of records to the rows of the paper's tables: datasets, groups, levels, and the mean of the groups.

As in the paper, the value of a dataset is the mean over its images, the value of a group is the mean over its datasets,
and the overall mean is over the ten groups of Table 1. A benchmark with several groups, such as ConceptShapes, counts
as one dataset in each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..metrics import MaskMetrics
from ..records.store import Record
from . import paper_figures
from .bootstrap import Interval, Resampled, average, resample

LEVELS = ("CI", "CD", "CR")
WITH_INTERVALS = ("f_w", "miou")  # those of Table 1


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        kind: "data set", "group", "level" or "mean".
        level: The level; empty for the mean.
        group: The group; empty for levels and the mean.
        sources: The datasets of the row, each with its split.
        samples: Number of samples, including those without a ground truth mask.
        values: Metric -> percent; None if no sample counts.
        intervals: Metric of `WITH_INTERVALS` -> bootstrap interval over samples; None if a dataset has a single sample,
            which does not determine an interval.
        shortcut_share: Percentage of the samples that SAM 3 answered alone.
    """

    kind: str
    level: str
    group: str
    sources: tuple[tuple[str, str], ...]
    samples: int
    values: dict[str, float | None]
    intervals: dict[str, Interval | None]
    shortcut_share: float | None

    @property
    def dataset(self) -> str:
        """The dataset of a row of kind "data set"."""
        return self.sources[0][0]

    @property
    def split(self) -> str:
        """The split of a row of kind "data set"."""
        return self.sources[0][1]


@dataclass(frozen=True)
class _Part:
    """A row and the resamples from which its intervals are computed."""

    row: Row
    resamples: dict[str, Resampled | None]


def levels_of(records: Iterable[Record]) -> list[str]:
    """Return the levels that occur, in the order of the paper."""
    present = {record["level"] for record in records}
    return [*(level for level in LEVELS if level in present), *sorted(present.difference(LEVELS))]


def aggregate(records: Sequence[Record], protocol: str, metrics: Sequence[str]) -> list[Row]:
    """Return a row for each dataset, each group, each level, and the mean of the ten groups if all ten occur."""
    keys = dict.fromkeys(_key(record) for record in records)
    level_order = {level: number for number, level in enumerate(levels_of(records))}
    group_order = {group: number for number, group in enumerate(paper_figures.groups())}
    dataset_order = {name: number for number, name in enumerate(paper_figures.data_sets())}
    sorted_keys = sorted(
        keys,
        key=lambda key: (
            level_order[key[0]],
            group_order.get(key[1], len(group_order)),
            dataset_order.get(key[2], 0),
        ),
    )
    parts = [
        _dataset(key, [record for record in records if _key(record) == key], protocol, metrics)
        for key in sorted_keys
    ]
    groups = {
        (part.row.level, part.row.group): [
            other for other in parts if (other.row.level, other.row.group) == (part.row.level, part.row.group)
        ]
        for part in parts
    }
    group_means = [
        _mean("group", level, group, members, metrics) for (level, group), members in groups.items()
    ]
    levels = []
    for level in level_order:
        # The paper's means of levels exclude datasets without a column in Table 1: urban scenes and ReasonSeg.
        members = [part for part in parts if part.row.level == level]
        members = [part for part in members if part.row.group in group_order] or members
        levels.append(_mean("level", level, "", members, metrics))
    table_1_groups = [part for part in group_means if part.row.group in group_order]
    if {part.row.group for part in table_1_groups} == set(group_order):
        levels.append(_mean("mean", "", "", table_1_groups, metrics))
    return [part.row for part in (*parts, *group_means, *levels)]


def sample_values(
    records: Iterable[Record], protocol: str, metrics: Sequence[str]
) -> list[dict[str, float] | None]:
    """Return each metric of each sample, in percent; None for samples without a ground truth mask."""
    values: list[dict[str, float] | None] = []
    for record in records:
        if record["scores"] is None:
            values.append(None)
            continue
        single = MaskMetrics(protocol, metrics=metrics)
        single.merge([record["scores"]])
        values.append(single.compute())
    return values


def _key(record: Record) -> tuple[str, str, str, str]:
    return record["level"], record["group"], record.get("dataset", ""), record.get("split", "")


def _dataset(
    key: tuple[str, str, str, str], records: Sequence[Record], protocol: str, metrics: Sequence[str]
) -> _Part:
    level, group, dataset, split = key
    masks = MaskMetrics(protocol, metrics=metrics)
    masks.merge(record["scores"] for record in records if record["scores"] is not None)
    values: dict[str, float | None] = {**masks.compute()} if masks.scores else dict.fromkeys(metrics)
    names = [name for name in WITH_INTERVALS if name in metrics]
    sample_metrics = [value for value in sample_values(records, protocol, names) if value is not None]
    resamples = {
        name: resample([value[name] for value in sample_metrics], stream="/".join((*key, name)))
        for name in names
    }
    routes = [record["route"] for record in records if record["route"] is not None]
    shortcut_share = 100 * routes.count("shortcut") / len(routes) if routes else None
    return _part(
        ("data set", level, group, ((dataset, split),), len(records)), values, resamples, shortcut_share
    )


def _mean(kind: str, level: str, group: str, parts: Sequence[_Part], metrics: Sequence[str]) -> _Part:
    def mean(values: Iterable[float | None]) -> float | None:
        counted = [value for value in values if value is not None]
        return sum(counted) / len(counted) if counted else None

    rows = [part.row for part in parts]
    values = {name: mean(row.values[name] for row in rows) for name in metrics}
    names = [name for name in WITH_INTERVALS if name in metrics]
    resamples = {name: average([part.resamples[name] for part in parts]) for name in names}
    sources = tuple(source for row in rows for source in row.sources)
    samples = sum(row.samples for row in rows)
    shortcut_share = mean(row.shortcut_share for row in rows)
    return _part((kind, level, group, sources, samples), values, resamples, shortcut_share)


def _part(
    names: tuple[str, str, str, tuple[tuple[str, str], ...], int],
    values: dict[str, float | None],
    resamples: dict[str, Resampled | None],
    shortcut_share: float | None,
) -> _Part:
    intervals = {
        name: None if resampled is None or resampled.smallest < 2 else resampled.interval()
        for name, resampled in resamples.items()
    }
    return _Part(Row(*names, values, intervals, shortcut_share), resamples)
