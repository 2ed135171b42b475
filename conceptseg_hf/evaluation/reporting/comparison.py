"""Paired comparison of two evaluations of the same samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data import ConceptSample
from ...writing import json_text, write_files
from ..records.runs import Run, read_runs
from ..records.samples import sample_to_show
from ..records.store import Record
from . import paper_figures
from .aggregate import levels_of, sample_values
from .bootstrap import Interval, average, resample
from .gallery import (
    CASES,
    Section,
    case_html,
    case_title,
    ground_truth_images,
    prediction_image,
    prior_image,
    result_facts,
    write_page,
)
from .tables import csv_text, interval_text, interval_values, markdown_table, provenance, provenance_line

TIE = 0.01
"""Foreground IoUs that differ by at most this value are a tie."""


@dataclass(frozen=True)
class Pair:
    """The records of one sample in two runs.

    Attributes:
        source: The benchmark and split.
        index: Index of the sample in the benchmark.
        first: The record in the first run.
        second: The record in the second run.
    """

    source: tuple[str, str]
    index: int
    first: Record
    second: Record

    @property
    def difference(self) -> float:
        """Foreground IoU of the second record minus that of the first."""
        return self.second["foreground_iou"] - self.first["foreground_iou"]


@dataclass(frozen=True)
class ComparedRow:
    """One row of the table.

    Attributes:
        level: The level; "all" for all levels.
        group: The group; "all" for all groups, "absent" for the samples without their concept.
        first: Mean foreground IoU of the first run.
        second: Mean foreground IoU of the second run.
        difference: The mean difference, with its bootstrap interval over pairs.
        wins: Number of pairs in which the second run is better by more than `TIE`.
        ties: Number of pairs in which neither run is.
        losses: Number of pairs in which the first run is better by more than `TIE`.
    """

    level: str
    group: str
    first: float
    second: float
    difference: Interval
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same samples.

    Attributes:
        names: Names of the runs.
        settings: Settings of the runs; for several benchmarks, those of the first benchmark.
        pairs: The samples with a ground truth mask that both runs have.
        unpaired: Numbers of samples that only the first run has, and that only the second run has.
    """

    names: tuple[str, str]
    settings: tuple[dict[str, Any], dict[str, Any]]
    pairs: list[Pair]
    unpaired: tuple[int, int]

    @cached_property
    def table(self) -> list[ComparedRow]:
        """Rows for each group, each level and all samples that show their concept, then one for the other samples."""
        present = [pair for pair in self.pairs if pair.first["present"]]
        rows = []
        for level in levels_of(pair.first for pair in present):
            level_pairs = [pair for pair in present if pair.first["level"] == level]
            for group in dict.fromkeys(pair.first["group"] for pair in level_pairs):
                rows.append(
                    _row(level, group, [pair for pair in level_pairs if pair.first["group"] == group])
                )
            rows.append(_row(level, "all", level_pairs))
        if present:
            rows.append(_row("all", "all", present))
        absent = [pair for pair in self.pairs if not pair.first["present"]]
        if absent:
            rows.append(_row("all", "absent", absent))
        return rows

    @cached_property
    def mean_of_groups(self) -> tuple[str, Interval] | None:
        """The names of the groups, and the difference in their mean mIoU (percent) with its interval.

        The groups are the ten groups of the paper's Table 1, or those of them that occur. The value of a group is the
        mean over its datasets. None without pairs.
        """
        table_1_groups = paper_figures.groups()
        pairs = [pair for pair in self.pairs if pair.first["group"] in table_1_groups] or self.pairs
        if not pairs:
            return None
        protocol = self.settings[0]["protocol"]
        first, second = (
            [value["miou"] for value in sample_values(records, protocol, ["miou"]) if value is not None]
            for records in ([pair.first for pair in pairs], [pair.second for pair in pairs])
        )
        differences: dict[str, dict[tuple[str, str], list[float]]] = {}
        for pair, first_miou, second_miou in zip(pairs, first, second, strict=True):
            differences.setdefault(pair.first["group"], {}).setdefault(pair.source, []).append(
                second_miou - first_miou
            )
        means = [
            average([resample(values, f"{group}/{source}") for source, values in by_source.items()])
            for group, by_source in differences.items()
        ]
        name = "the ten groups" if set(differences) == set(table_1_groups) else ", ".join(differences)
        mean = average(means)
        return None if mean is None else (name, mean.interval())

    @property
    def remarks(self) -> list[str]:
        """The settings that differ between the runs, and the samples that are excluded, as lines of text."""
        first, second = self.settings
        skipped = ("environment", "root")
        names = [name for name in {**first, **second} if name not in skipped]
        changed = [
            f"{name} {first.get(name)} / {second.get(name)}"
            for name in names
            if first.get(name) != second.get(name)
        ]
        lines = [f"Settings that differ: {', '.join(changed)}." if changed else "The settings are the same."]
        for name, count in zip(self.names, self.unpaired, strict=True):
            if count:
                lines.append(f"{count} samples of {name} are not in the other run and are excluded.")
        return lines

    def to_markdown(self) -> str:
        """Return the table in Markdown, with the settings above and the meaning of the columns below."""
        lines = [f"A: {self.names[0]}, B: {self.names[1]}; {len(self.pairs)} samples in both runs.", ""]
        for letter, settings in zip("AB", self.settings, strict=True):
            lines.append(f"- {letter}: {provenance_line(settings, len(self.pairs))}")
        lines += [f"- {remark}" for remark in self.remarks]
        if self.mean_of_groups is not None:
            name, interval = self.mean_of_groups
            lines += ["", f"Mean mIoU of {name}, B - A: {interval_text(interval, 2, signed=True)} points."]
        rows = [
            [
                row.level,
                row.group,
                str(row.difference.samples),
                f"{row.first:.3f}",
                f"{row.second:.3f}",
                interval_text(row.difference, 3, signed=True),
                *map(str, (row.wins, row.ties, row.losses)),
            ]
            for row in self.table
        ]
        heading = ["level", "group", "samples", "A", "B", "B - A [95 % interval]", "B wins", "ties", "A wins"]
        lines += ["", *markdown_table(heading, rows), ""]
        lines += [
            "- A and B: mean foreground IoU of the samples that show their concept.",
            "- 95 % interval: of the mean difference, by bootstrap over pairs.",
            f"- ties: foreground IoUs that differ by at most {TIE}.",
        ]
        if any(row.group == "absent" for row in self.table):
            lines.append(
                "- absent: samples without their concept; an empty mask counts as 1, any other as 0."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and their provenance as JSON values."""
        mean_of_groups = self.mean_of_groups
        return {
            "runs": [
                {"name": name, "provenance": provenance(settings, len(self.pairs)), "settings": settings}
                for name, settings in zip(self.names, self.settings, strict=True)
            ],
            "remarks": self.remarks,
            "samples": len(self.pairs),
            "mean_of_groups_miou": mean_of_groups
            and {"groups": mean_of_groups[0], **(interval_values(mean_of_groups[1]) or {})},
            "table": [vars(row) | {"difference": interval_values(row.difference)} for row in self.table],
        }

    def to_csv(self) -> str:
        """Return the pairs as CSV, one per line."""
        return csv_text(
            [
                {
                    "benchmark": pair.source[0],
                    "split": pair.source[1],
                    "sample_id": pair.first["sample_id"],
                    "level": pair.first["level"],
                    "group": pair.first["group"],
                    "present": pair.first["present"],
                    "a": pair.first["foreground_iou"],
                    "b": pair.second["foreground_iou"],
                    "difference": pair.difference,
                    "route_a": pair.first["route"],
                    "route_b": pair.second["route"],
                }
                for pair in self.pairs
            ]
        )

    def write(
        self,
        folder: str | os.PathLike,
        open_samples: Callable[[str, str], Sequence[ConceptSample]] | None = None,
    ) -> None:
        """Write comparison.md, comparison.json and comparison.csv, and gallery.html if `open_samples` is given.

        Args:
            folder: An existing folder.
            open_samples: Returns the samples of a benchmark and split.
        """
        folder = Path(folder)
        write_files(
            {
                folder / "comparison.md": self.to_markdown() + "\n",
                folder / "comparison.json": json_text(self.to_dict(), indent=2) + "\n",
                folder / "comparison.csv": self.to_csv(),
            }
        )
        if open_samples is not None:
            self.write_gallery(folder / "gallery.html", open_samples)

    def write_gallery(
        self,
        path: str | Path,
        open_samples: Callable[[str, str], Sequence[ConceptSample]],
        count: int = CASES,
    ) -> None:
        """Write a page of the pairs with the largest differences.

        Args:
            path: The HTML file.
            open_samples: Returns the samples of a benchmark and split.
            count: Maximum number of cases per section.
        """
        samples = {
            source: open_samples(*source) for source in dict.fromkeys(pair.source for pair in self.pairs)
        }
        ordered = sorted(self.pairs, key=lambda pair: pair.difference)
        losses = [pair for pair in ordered if pair.difference < -TIE][:count]
        wins = [pair for pair in reversed(ordered) if pair.difference > TIE][:count]
        sections = [
            Section(heading, note, (self._case(pair, samples[pair.source]) for pair in pairs))
            for heading, note, pairs in (
                ("B wins", f"The samples with the largest gains of B ({self.names[1]}) over A.", wins),
                ("A wins", f"The samples with the largest gains of A ({self.names[0]}) over B.", losses),
            )
        ]
        write_page(path, f"A: {self.names[0]}, B: {self.names[1]}", " ".join(self.remarks), sections)

    def _case(self, pair: Pair, samples: Sequence[ConceptSample]) -> str:
        sample = sample_to_show(samples, pair.index)
        images = []
        if isinstance(sample, ConceptSample):
            images = ground_truth_images(sample, mosaic=self.settings[0].get("mosaic"))
            for letter, record in zip("AB", (pair.first, pair.second), strict=True):
                if (prior := prior_image(sample, record)) is not None:
                    images.append((f"{letter}: positional prior", prior))
                if record["error"] is None:
                    images.append((letter, prediction_image(sample, record)))
        facts = {"prompt": pair.first["prompt"], "ground truth answer": pair.first.get("gt_answer")}
        for letter, record in zip("AB", (pair.first, pair.second), strict=True):
            facts |= {f"{letter}: {name}": value for name, value in result_facts(record).items()}
        return case_html(f"{case_title(pair.first)} ({pair.difference:+.3f})", images, facts)


def compare(
    first: str | os.PathLike, second: str | os.PathLike, names: tuple[str, str] | None = None
) -> Comparison:
    """Compare two evaluations sample by sample.

    Args:
        first: Output folder of an evaluation.
        second: Output folder of another evaluation of the same benchmarks under the same protocol.
        names: Names of the evaluations; by default, the names of their folders.

    Raises:
        FileNotFoundError: If a folder holds no evaluation.
        ValueError: If the evaluations are of different data or protocols, or have no sample in common.
    """
    folders = Path(first), Path(second)
    runs = read_runs(folders[0]), read_runs(folders[1])
    if set(runs[0]) != set(runs[1]):
        sources = [", ".join("/".join(filter(None, source)) for source in sorted(run)) for run in runs]
        raise ValueError(
            f"compare: {str(first)!r} is of {sources[0]}, but {str(second)!r} is of {sources[1]}; compare evaluations "
            "of the same benchmarks and splits."
        )
    pairs: list[Pair] = []
    unpaired = (0, 0)
    for source in runs[0]:
        source_pairs, unpaired_of_source = _pairs(source, runs[0][source], runs[1][source])
        pairs += source_pairs
        unpaired = (unpaired[0] + unpaired_of_source[0], unpaired[1] + unpaired_of_source[1])
    if not pairs:
        raise ValueError(
            f"compare: {str(first)!r} and {str(second)!r} have no sample with a mask in common; compare evaluations "
            "of the same samples."
        )
    return Comparison(names or _names(folders), (_settings(runs[0]), _settings(runs[1])), pairs, unpaired)


def _settings(runs: Mapping[tuple[str, str], Run]) -> dict[str, Any]:
    """Return the settings of the first benchmark, with the names of all benchmarks."""
    first = next(iter(runs.values())).settings
    if len(runs) == 1:
        return first
    return first | {"benchmark": "+".join(dict.fromkeys(name for name, _ in runs)), "split": ""}


def _pairs(source: tuple[str, str], first: Run, second: Run) -> tuple[list[Pair], tuple[int, int]]:
    protocols = [run.settings["protocol"] for run in (first, second)]
    if protocols[0] != protocols[1]:
        raise ValueError(
            f"compare: {source[0]!r} was evaluated under the protocols {protocols[0]} and {protocols[1]}; run one of "
            "the evaluations again with the protocol of the other."
        )
    second_records = {_sample(record): (index, record) for index, record in second.records.items()}
    pairs = []
    common = 0
    for record in first.records.values():
        if _sample(record) not in second_records:
            continue
        index, other = second_records[_sample(record)]
        common += 1
        if record["foreground_iou"] is None or other["foreground_iou"] is None:
            continue
        if _ground_truth(record) != _ground_truth(other):
            raise ValueError(
                f"compare: the ground truth of sample {record['sample_id']!r} differs between the evaluations; "
                "evaluate both on the same files."
            )
        pairs.append(Pair(source, index, record, other))
    return pairs, (len(first.records) - common, len(second.records) - common)


def _sample(record: Record) -> tuple[str, str, str]:
    return record.get("dataset", ""), record.get("split", ""), record["sample_id"]


def _ground_truth(record: Record) -> tuple[float, float]:
    """Return the number of pixels of the ground truth foreground, and of the image."""
    scores = record["scores"]
    foreground = scores["tp"] + scores["fn"]
    return foreground, foreground + scores["fp"] + scores["tn"]


def _names(folders: tuple[Path, Path]) -> tuple[str, str]:
    first, second = (folder.resolve().name for folder in folders)
    return (first, second) if first != second else (str(folders[0]), str(folders[1]))


def _row(level: str, group: str, pairs: Sequence[Pair]) -> ComparedRow:
    differences = [pair.difference for pair in pairs]
    difference = resample(differences, f"{level}/{group}")
    assert difference is not None  # a row has pairs
    wins, losses = (sum(sign * value > TIE for value in differences) for sign in (1, -1))
    return ComparedRow(
        level=level,
        group=group,
        first=sum(pair.first["foreground_iou"] for pair in pairs) / len(pairs),
        second=sum(pair.second["foreground_iou"] for pair in pairs) / len(pairs),
        difference=difference.interval(),
        wins=wins,
        ties=len(differences) - wins - losses,
        losses=losses,
    )
