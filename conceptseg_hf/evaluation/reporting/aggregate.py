"""From records to the rows of the paper's tables: data sets, groups, levels, and the mean of the groups.

As in the paper, a data set's value is the mean over its images, a group's the mean over its data sets, the mean that of
the ten groups of Table 1. A benchmark of several groups, such as ConceptShapes, counts as a data set in each of them.
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
        sources: The data sets it goes over, each with its split.
        samples: Over how many samples; those without a true mask are among them.
        values: Metric -> percent; None where nothing was counted.
        intervals: Metric of `WITH_INTERVALS` -> its bootstrap interval over samples; None where a data set has one
            sample, which tells nothing of others.
        shortcut_share: Percent of the samples that SAM 3 answered alone.
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
        """The data set of a row of kind "data set"."""
        return self.sources[0][0]

    @property
    def split(self) -> str:
        """Its split."""
        return self.sources[0][1]


@dataclass(frozen=True)
class _Part:
    """A row and the resamples that its intervals come from."""

    row: Row
    resamples: dict[str, Resampled | None]


def levels_of(records: Iterable[Record]) -> list[str]:
    """The levels that occur, in the order of the paper."""
    present = {record["level"] for record in records}
    return [*(level for level in LEVELS if level in present), *sorted(present.difference(LEVELS))]


def aggregate(records: Sequence[Record], protocol: str, metrics: Sequence[str]) -> list[Row]:
    """The rows: each data set, each group, each level, and the mean of the ten groups if all ten are there."""
    keys = dict.fromkeys(_key(record) for record in records)
    order = {level: number for number, level in enumerate(levels_of(records))}
    group_order = {group: number for number, group in enumerate(paper_figures.groups())}
    set_order = {name: number for number, name in enumerate(paper_figures.data_sets())}
    known = sorted(
        keys,
        key=lambda key: (order[key[0]], group_order.get(key[1], len(group_order)), set_order.get(key[2], 0)),
    )
    parts = [
        _data_set(key, [record for record in records if _key(record) == key], protocol, metrics)
        for key in known
    ]
    groups = {
        (part.row.level, part.row.group): [
            other for other in parts if (other.row.level, other.row.group) == (part.row.level, part.row.group)
        ]
        for part in parts
    }
    means = [_mean("group", level, group, of, metrics) for (level, group), of in groups.items()]
    levels = []
    for level in order:
        # The paper's means of levels leave out what Table 1 has no column for: urban scenes and ReasonSeg.
        of = [part for part in parts if part.row.level == level]
        of = [part for part in of if part.row.group in group_order] or of
        levels.append(_mean("level", level, "", of, metrics))
    ten = [part for part in means if part.row.group in group_order]
    if {part.row.group for part in ten} == set(group_order):
        levels.append(_mean("mean", "", "", ten, metrics))
    return [part.row for part in (*parts, *means, *levels)]


def sample_values(
    records: Iterable[Record], protocol: str, metrics: Sequence[str]
) -> list[dict[str, float] | None]:
    """Each metric of each sample, in percent; None for samples without a true mask."""
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


def _data_set(
    key: tuple[str, str, str, str], records: Sequence[Record], protocol: str, metrics: Sequence[str]
) -> _Part:
    level, group, dataset, split = key
    masks = MaskMetrics(protocol, metrics=metrics)
    masks.merge(record["scores"] for record in records if record["scores"] is not None)
    values: dict[str, float | None] = {**masks.compute()} if masks.scores else dict.fromkeys(metrics)
    wanted = [name for name in WITH_INTERVALS if name in metrics]
    each = [value for value in sample_values(records, protocol, wanted) if value is not None]
    resamples = {
        name: resample([value[name] for value in each], stream="/".join((*key, name))) for name in wanted
    }
    routes = [record["route"] for record in records if record["route"] is not None]
    fraction = 100 * routes.count("shortcut") / len(routes) if routes else None
    return _part(("data set", level, group, ((dataset, split),), len(records)), values, resamples, fraction)


def _mean(kind: str, level: str, group: str, of: Sequence[_Part], metrics: Sequence[str]) -> _Part:
    def mean(found: Iterable[float | None]) -> float | None:
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    rows = [part.row for part in of]
    values = {name: mean(row.values[name] for row in rows) for name in metrics}
    names = [name for name in WITH_INTERVALS if name in metrics]
    resamples = {name: average([part.resamples[name] for part in of]) for name in names}
    sources = tuple(source for row in rows for source in row.sources)
    samples = sum(row.samples for row in rows)
    fraction = mean(row.shortcut_share for row in rows)
    return _part((kind, level, group, sources, samples), values, resamples, fraction)


def _part(
    names: tuple[str, str, str, tuple[tuple[str, str], ...], int],
    values: dict[str, float | None],
    resamples: dict[str, Resampled | None],
    shortcut_share: float | None,
) -> _Part:
    intervals = {
        name: None if found is None or found.smallest < 2 else found.interval()
        for name, found in resamples.items()
    }
    return _Part(Row(*names, values, intervals, shortcut_share), resamples)
