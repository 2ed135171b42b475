"""What an evaluation says: a table by level and group, made from the records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import MaskMetrics, presence_auc

_MASK_HEADINGS = {
    "f_w": "F_w",
    "miou": "mIoU",
    "giou": "gIoU",
    "ciou": "cIoU",
    "mae": "MAE (lower is better)",
    "ber": "BER (lower is better)",
    "s_measure": "S-measure",
    "mdice": "mDice",
}

_LISTED = 50  # errors in a report
LEVELS = ("CI", "CD", "CR")

Record = dict[str, Any]

# Column, its heading, and what the column means.
_COLUMNS = (
    ("samples", "samples", "all samples of the row"),
    (
        "foreground_iou",
        "fg IoU",
        "mean foreground IoU of the samples that show their concept; a failed sample counts 0",
    ),
    (
        "rejection_rate",
        "rejected",
        "share of the samples without their concept whose final presence is below 0.5",
    ),
    (
        "presence_auc",
        "presence AUC",
        "does the final presence tell samples with their concept from those without",
    ),
    ("shortcut_share", "shortcut", "share of the samples that SAM 3 answered alone"),
    ("format_rate", "format", "share of the completions that follow the template"),
    ("box_iou", "box IoU", "mean IoU of the completions' boxes with the true ones; a missing box counts 0"),
    ("check_iou", "check IoU", "mean IoU of the check boxes with the withheld ones; a missing box counts 0"),
    ("failed", "failed", "samples that ended with an error"),
)


@dataclass(frozen=True)
class EvaluationReport:
    """The outcome of `evaluate`.

    Attributes:
        records: One record per sample (see `records.make_record`), in the order of the benchmark.
        settings: What was run: benchmark, split, protocol, router, model.
    """

    records: list[Record]
    settings: dict[str, Any]

    @property
    def table(self) -> list[dict[str, Any]]:
        """Rows for each group, each level and all.

        `level` and `group` ("all" for sums) name a row; its numbers are means over samples, None where
        nothing was counted; `masks` holds the metrics of masks over all samples of the row that have a
        true mask, in percent.
        """
        rows = []
        for level in self.levels:
            records = [record for record in self.records if record["level"] == level]
            groups = list(dict.fromkeys(record["group"] for record in records))
            rows += [
                self._row(level, group, [record for record in records if record["group"] == group])
                for group in groups
            ]
            rows.append(self._row(level, "all", records))
        rows.append(self._row("all", "all", self.records))
        return rows

    def _row(self, level: str, group: str, records: Sequence[Record]) -> dict[str, Any]:
        masks = MaskMetrics(self.settings["protocol"], metrics=self.settings["metrics"])
        masks.merge(record["scores"] for record in records if record["scores"] is not None)
        values = masks.compute() if masks.scores else dict.fromkeys(self.settings["metrics"])
        return _row(level, group, records) | {"masks": values}

    @property
    def failed(self) -> list[Record]:
        """The records that end with an error."""
        return [record for record in self.records if record["error"] is not None]

    @property
    def levels(self) -> list[str]:
        """The levels that occur, in the order of the paper."""
        present = {record["level"] for record in self.records}
        return [*(level for level in LEVELS if level in present), *sorted(present.difference(LEVELS))]

    def summary(self) -> str:
        """One line: the foreground IoU of each level and of all samples."""
        rows = {row["level"]: row["foreground_iou"] for row in self.table if row["group"] == "all"}
        return "foreground IoU: " + " | ".join(f"{level} {_number(value)}" for level, value in rows.items())

    def to_markdown(self) -> str:
        """The table in two parts, with what was run above and the meaning of the columns below."""
        settings = self.settings
        names = ("benchmark", "split", "protocol", "router", "model")
        lines = [
            ", ".join(f"{name} {settings[name]}" for name in names if settings.get(name))
            + f"; {len(self.records)} samples.",
            "",
        ]
        table = self.table
        columns = [
            column for column in _COLUMNS if column[0] != "failed" or any(row["failed"] for row in table)
        ]
        lines += _markdown(
            ["level", "group", *(heading for _, heading, _ in columns)],
            [[row["level"], row["group"], *(_number(row[name]) for name, _, _ in columns)] for row in table],
        )
        lines += ["", *(f"- {heading}: {meaning}." for _, heading, meaning in columns)]
        lines += ["", "Masks of all samples, absent concepts included, in percent:", ""]
        metrics = settings["metrics"]
        lines += _markdown(
            ["level", "group", *(_MASK_HEADINGS[name] for name in metrics)],
            [
                [row["level"], row["group"], *(_percent(row["masks"][name]) for name in metrics)]
                for row in table
            ],
        )
        without = sum(record["scores"] is None for record in self.records)
        if without:
            lines += ["", f"{without} samples have no mask to compare with and are in none of these metrics."]
        if self.failed:
            lines += ["", "Samples that ended with an error:", ""]
            lines += [f"- {record['sample_id']}: {record['error']}" for record in self.failed[:_LISTED]]
        if len(self.failed) > _LISTED:
            lines.append(f"- and {len(self.failed) - _LISTED} more; records.jsonl has them all.")
        return "\n".join(lines)


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with aligned columns."""
    cells = [heading, *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(heading))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _row(level: str, group: str, records: Sequence[Record]) -> dict[str, Any]:
    judged = [record for record in records if record["decode_presence"] is not None]
    return {
        "level": level,
        "group": group,
        "samples": len(records),
        "foreground_iou": _mean(records, "foreground_iou", lambda record: record["present"]),
        "rejection_rate": _mean(records, "rejected", lambda record: not record["present"]),
        "presence_auc": presence_auc(
            [record["decode_presence"] for record in judged], [record["present"] for record in judged]
        ),
        "shortcut_share": _share(
            record["route"] == "shortcut" for record in records if record["route"] is not None
        ),
        "format_rate": _mean(records, "format_valid"),
        "box_iou": _mean(records, "box_iou"),
        "check_iou": _mean(records, "check_iou"),
        "failed": sum(record["error"] is not None for record in records),
    }


def _mean(
    records: Iterable[Record], name: str, counts: Callable[[Record], bool] = lambda record: True
) -> float | None:
    return _share(record[name] for record in records if counts(record) and record[name] is not None)


def _share(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
