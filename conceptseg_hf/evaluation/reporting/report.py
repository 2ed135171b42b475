"""The report of an evaluation: the paper's tables, and a table by level and group, computed from the records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data import ConceptSample
from ...data.concept_shapes.families import FURTHER_GROUPS
from ...writing import json_text, write_files
from ..metrics import MaskMetrics, presence_auc
from ..records.choice import TARGET
from ..records.store import Record
from . import paper_figures
from .aggregate import Row, aggregate, levels_of
from .bootstrap import foreground_iou
from .choice_table import choice_table
from .coprs_tables import sections as coprs_sections
from .data_notes import data_notes, data_remarks
from .decomposition import decompose
from .gallery import write_gallery, write_prior_gallery
from .paper_tables import paper_value, remarks, table_1, table_2, table_8, table_10
from .prior_table import prior_dict, prior_section
from .tables import (
    csv_text,
    fraction,
    heading_of,
    interval_values,
    markdown_table,
    percent,
    provenance,
    provenance_line,
)
from .tiers import tier_rows, tier_table

_MAX_LISTED_ERRORS = 50

# Key, heading and meaning of each column.
_COLUMNS = (
    ("samples", "samples", "all samples of the row"),
    (
        "foreground_iou",
        "fg IoU",
        "mean foreground IoU of the samples that show their concept; a failed sample counts as 0",
    ),
    ("foreground_iou_interval", "95 % interval", "of fg IoU, by bootstrap over the samples"),
    (
        "rejection_rate",
        "rejected",
        "fraction of the samples without their concept that have a final presence below 0.5",
    ),
    (
        "presence_auc",
        "presence AUC",
        "area under the ROC curve of the final presence, for samples with and without their concept",
    ),
    ("shortcut_share", "shortcut", "fraction of the samples that SAM 3 answered alone"),
    (
        "routing_regret",
        "regret",
        "mean gain in foreground IoU if the better of both routes had been taken",
    ),
    (
        "regretted",
        "regretted",
        "fraction of the samples for which the other route has a higher foreground IoU",
    ),
    ("format_rate", "format", "fraction of the completions that follow the template"),
    (
        "box_iou",
        "box IoU",
        "mean IoU of the completions' boxes with the ground truth boxes; a missing box counts as 0",
    ),
    (
        "check_iou",
        "check IoU",
        "mean IoU of the check boxes with the withheld boxes; a missing box counts as 0",
    ),
    (
        "chosen_right",
        "right object",
        "fraction of the samples with a mask that overlaps the target more than any other object",
    ),
    ("sibling_fraction", "siblings masked", "mean fraction of the area of the wrong objects that is masked"),
    ("failed", "failed", "samples that ended with an error"),
)
# Columns that are omitted if no row has a value.
_OPTIONAL = ("routing_regret", "regretted", "chosen_right", "sibling_fraction")


@dataclass(frozen=True)
class EvaluationReport:
    """The result of `evaluate`.

    Attributes:
        records: One record per sample (see `records.make_record`), in the order of the benchmark.
        settings: The settings of the run: benchmark, split, protocol, router, model and so on.
    """

    records: list[Record]
    settings: dict[str, Any]

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the paper's tables: datasets, groups, levels, and the mean of the ten groups."""
        return aggregate(self.records, self.settings["protocol"], self.settings["metrics"])

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """Rows for each group, its strata if it has any, each level, and all samples.

        `level` and `group` ("all" for summary rows) identify a row. Its numbers are means over samples, None if no
        sample counts; `masks` holds the metrics of masks over all samples of the row that have a ground truth mask, in
        percent. Summary rows exclude groups that are not in Table 1.
        """
        rows = []
        for level in self.levels:
            records = [record for record in self.records if record["level"] == level]
            groups = list(dict.fromkeys(record["group"] for record in records))
            for group in groups:
                members = [record for record in records if record["group"] == group]
                strata = dict.fromkeys(stratum for record in members if (stratum := record.get("stratum")))
                rows.append(self._row(level, group, members))
                rows += [
                    self._row(level, f"{group}: {name}", [r for r in members if r["stratum"] == name])
                    for name in strata
                ]
            rows.append(self._row(level, "all", _summed(records)))
        rows.append(self._row("all", "all", _summed(self.records)))
        return rows

    def _row(self, level: str, group: str, records: Sequence[Record]) -> dict[str, Any]:
        masks = MaskMetrics(self.settings["protocol"], metrics=self.settings["metrics"])
        masks.merge(record["scores"] for record in records if record["scores"] is not None)
        values = masks.compute() if masks.scores else dict.fromkeys(self.settings["metrics"])
        return _row(level, group, records) | {"masks": values}

    @property
    def failed(self) -> list[Record]:
        """The records that ended with an error."""
        return [record for record in self.records if record["error"] is not None]

    @property
    def levels(self) -> list[str]:
        """The levels that occur, in the order of the paper."""
        return levels_of(self.records)

    def summary(self) -> str:
        """Return the foreground IoU of each level and of all samples, as one line."""
        rows = {row["level"]: row["foreground_iou"] for row in self.table if row["group"] == "all"}
        return "foreground IoU: " + " | ".join(f"{level} {fraction(value)}" for level, value in rows.items())

    def write(self, folder: str | os.PathLike, samples: Sequence[ConceptSample] | None = None) -> None:
        """Write report.md, report.json and report.csv; if samples are given, gallery.html; for CoPRS, heatmaps.html.

        Args:
            folder: An existing folder.
            samples: The samples of the records, in the same order; those in the gallery are read again.
        """
        folder = Path(folder)
        write_files(
            {
                folder / "report.md": self.to_markdown() + "\n\n" + self.summary() + "\n",
                folder / "report.json": json_text(self.to_dict(), indent=2) + "\n",
                folder / "report.csv": self.to_csv(),
            }
        )
        if samples is not None:
            write_gallery(folder / "gallery.html", self.records, self.settings, samples)
            if any(record.get("prior") is not None for record in self.records):
                write_prior_gallery(folder / "heatmaps.html", self.records, self.settings, samples)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and their provenance as JSON values."""
        return {
            "settings": self.settings,
            "provenance": provenance(self.settings, len(self.records)),
            "remarks": remarks(self.rows, self.settings),
            "samples": len(self.records),
            "paper_layout": [_row_values(row, self.settings) for row in self.rows],
            "table": self.table,
            **(
                {"outcomes": decompose(self.records, self.settings["prediction_threshold"])}
                if "judgements" in self.settings
                else {}
            ),
            **({"tiers": rows} if (rows := tier_rows(self.records)) else {}),
            **({"prior": rows} if (rows := prior_dict(self.records)) else {}),
            **data_notes(self.records),
            "errors": [
                {"sample_id": record["sample_id"], "error": record["error"]} for record in self.failed
            ],
        }

    def to_csv(self) -> str:
        """Return one number per line, with its provenance and the paper's figures where these are comparable."""
        lines = []
        for row in self.rows:
            row_provenance = provenance(self.settings, row.samples)
            # The sources of a row are more specific than the benchmark of the run.
            row_provenance["benchmark"] = "+".join(dict.fromkeys(name for name, _ in row.sources))
            row_provenance["split"] = "+".join(dict.fromkeys(split for _, split in row.sources))
            for metric, value in (*row.values.items(), ("shortcut_share", row.shortcut_share)):
                interval = row.intervals.get(metric)
                paper_values = {
                    method: paper_value(row, metric, method, self.settings)
                    for method in paper_figures.METHODS
                }
                tables = {printed[1] for printed in paper_values.values() if printed is not None}
                lines.append(
                    {"row": row.kind, "level": row.level, "group": row.group, "metric": metric}
                    | {"value": value}
                    | {end: getattr(interval, end, None) for end in ("low", "high")}
                    | {f"paper {method}": printed and printed[0] for method, printed in paper_values.items()}
                    | {"paper table": next(iter(tables), None)}
                    | row_provenance
                )
        return csv_text(lines)

    def to_markdown(self) -> str:
        """Return the paper's tables and the table by level and group, with settings and meanings of columns."""
        settings = self.settings
        lines = [provenance_line(settings, len(self.records)), ""]
        lines += [f"- {remark}" for remark in remarks(self.rows, settings)]
        for title, make in (
            ("By group, as Table 1", table_1),
            ("By dataset, as Table 8", table_8),
            ("Routes, as Table 10", table_10),
        ):
            lines += ["", f"## {title}", "", *make(self.rows, settings)]
        if classes := table_2(self.records, settings):
            lines += ["", "## Cityscapes by class, as Table 2", "", *classes]
        if coprs := coprs_sections(self.rows, settings):
            lines += ["", "## Beside the tables of the CoPRS paper", "", *coprs]
        if prior := prior_section(self.records):
            lines += ["", "## Positional prior", "", *prior]
        if "judgements" in settings:
            lines += ["", "## Think, rule and prediction (appendix J)", "", *self._outcomes()]
        if rows := tier_rows(self.records):
            heading = ["tier", "samples", "share (%)", "fg IoU [95 % interval]"]
            lines += ["", "## Tiers of the concept", "", *markdown_table(heading, tier_table(rows))]
        lines += [
            "",
            "In these tables, values of datasets are means over images, and values of groups are means over datasets.",
            "",
            "## By sample",
            "",
            *self._sample_tables(),
        ]
        return "\n".join(lines)

    def _outcomes(self) -> list[str]:
        threshold = self.settings["prediction_threshold"]
        verdicts = {True: "right", False: "wrong", None: "not judged"}
        rows = decompose(self.records, threshold)
        table = [
            [
                *(verdicts[row[part]] for part in ("think", "rule", "prediction")),
                str(row["count"]),
                "-" if row["share"] is None else f"{100 * row['share']:.1f}",
            ]
            for row in rows
        ]
        judged = sum(row["count"] for row in rows)
        explanation = (
            f"Think and rule are judged by {self.settings['judgements']}; a prediction is right if its foreground IoU "
            f"is at least {threshold}. {judged} of {len(self.records)} samples are judged."
        )
        return [*markdown_table(["think", "rule", "prediction", "samples", "%"], table), "", explanation]

    def sample_tables(self) -> str:
        """Return only the tables by level and group, in Markdown, with the settings above."""
        return "\n".join([provenance_line(self.settings, len(self.records)), "", *self._sample_tables()])

    def _sample_tables(self) -> list[str]:
        settings = self.settings
        table = self.table
        columns = [
            column
            for column in _COLUMNS
            if (column[0] != "failed" or any(row["failed"] for row in table))
            and (column[0] not in _OPTIONAL or any(row.get(column[0]) is not None for row in table))
        ]
        lines = markdown_table(
            ["level", "group", *(heading for _, heading, _ in columns)],
            [
                [row["level"], row["group"], *(_cell(row.get(name)) for name, _, _ in columns)]
                for row in table
            ],
        )
        lines += ["", *(f"- {heading}: {meaning}." for _, heading, meaning in columns)]
        lines += ["", "Masks of all samples, absent concepts included, in percent:", ""]
        metrics = settings["metrics"]
        lines += markdown_table(
            ["level", "group", *map(heading_of, metrics)],
            [
                [row["level"], row["group"], *(percent(row["masks"][name]) for name in metrics)]
                for row in table
            ],
        )
        if chosen := choice_table(self.records):
            lines += ["", "Which object the mask overlaps most, in percent:", "", *chosen]
        without_mask = sum(record["scores"] is None for record in self.records)
        if without_mask:
            lines += [
                "",
                f"{without_mask} samples have no mask to compare with and are excluded from these metrics.",
            ]
        lines += data_remarks(self.records)
        if self.failed:
            lines += ["", "Samples that ended with an error:", ""]
            lines += [
                f"- {record['sample_id']}: {record['error']}" for record in self.failed[:_MAX_LISTED_ERRORS]
            ]
        if len(self.failed) > _MAX_LISTED_ERRORS:
            lines.append(f"- and {len(self.failed) - _MAX_LISTED_ERRORS} more; records.jsonl has them all.")
        return lines


def _row_values(row: Row, settings: Mapping[str, Any]) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    for method in paper_figures.METHODS:
        pairs = {metric: paper_value(row, metric, method, settings) for metric in row.values}
        values = {metric: {"value": pair[0], "table": pair[1]} for metric, pair in pairs.items() if pair}
        if values:
            figures[method] = values
    return {
        "row": row.kind,
        "level": row.level,
        "group": row.group,
        "sources": [list(source) for source in row.sources],
        "samples": row.samples,
        "values": row.values,
        "intervals": {metric: interval_values(interval) for metric, interval in row.intervals.items()},
        "shortcut_share": row.shortcut_share,
        "paper": figures,
    }


def _row(level: str, group: str, records: Sequence[Record]) -> dict[str, Any]:
    decoded = [record for record in records if record["decode_presence"] is not None]
    mean, interval = foreground_iou(records, stream=f"{level}/{group}")
    regrets = [record["routing_regret"] for record in records if record.get("routing_regret") is not None]
    return {
        "level": level,
        "group": group,
        "samples": len(records),
        "foreground_iou": mean,
        "foreground_iou_interval": interval,
        "rejection_rate": _mean(records, "rejected", lambda record: not record["present"]),
        "presence_auc": presence_auc(
            [record["decode_presence"] for record in decoded], [record["present"] for record in decoded]
        ),
        "shortcut_share": _fraction(
            record["route"] == "shortcut" for record in records if record["route"] is not None
        ),
        "routing_regret": _fraction(regrets),
        "regretted": _fraction(regret > 0 for regret in regrets),
        "format_rate": _mean(records, "format_valid"),
        "box_iou": _mean(records, "box_iou"),
        "check_iou": _mean(records, "check_iou"),
        "failed": sum(record["error"] is not None for record in records),
        **_choice(records),
    }


def _choice(records: Sequence[Record]) -> dict[str, float | None]:
    """Return the values that only rows with candidates have; see `records.choice`."""
    chosen = [record for record in records if "chosen" in record]
    if not chosen:
        return {}
    fractions = [record["sibling_fraction"] for record in chosen]
    return {
        "chosen_right": _fraction(record["chosen"] == TARGET for record in chosen),
        "sibling_fraction": _fraction(fraction for fraction in fractions if fraction is not None),
    }


def _summed(records: Sequence[Record]) -> Sequence[Record]:
    """Return the records of a summary row: those of Table 1's groups, or all records if there are none of these."""
    return [record for record in records if record["group"] not in FURTHER_GROUPS] or records


def _mean(
    records: Iterable[Record], name: str, condition: Callable[[Record], bool] = lambda record: True
) -> float | None:
    return _fraction(record[name] for record in records if condition(record) and record[name] is not None)


def _fraction(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _cell(value: Any) -> str:
    return f"{value[0]:.3f} to {value[1]:.3f}" if isinstance(value, list) else fraction(value)
