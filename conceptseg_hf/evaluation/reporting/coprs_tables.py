"""The results of a run beside Tables 1 and 2 of the CoPRS paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .aggregate import Row
from .tables import markdown_table, percent

_REASONSEG = "reasonseg"


@cache
def figures() -> dict[str, Any]:
    """Return the tables of the paper, in the layout of `coprs_figures.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("coprs_figures.yaml").read_text(encoding="utf-8"))


def sections(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Return the tables that the run has numbers for, as lines of Markdown; none for other benchmarks.

    Args:
        rows: Rows of the report.
        settings: Settings of the run. The paper compares masks at the size of the images, as the protocol "standard".
    """
    by_split = {
        (row.dataset, row.split): row.values
        for row in rows
        if row.kind == "data set" and row.split is not None
    }
    table_1, table_2 = figures()["table_1"], figures()["table_2"]
    lines: list[str] = []
    columns = [(dataset, split) for dataset, split in table_1["columns"]]
    if any(column in by_split for column in columns):
        values = [by_split.get(column, {}).get("ciou") for column in columns]
        titles = [f"{dataset} {split}" for dataset, split in columns]
        lines += _table("CoPRS, Table 1: cIoU", titles, table_1["rows"], values, settings)
    if any(dataset == _REASONSEG for dataset, _ in by_split):
        pairs = [(split, metric) for split, metric in table_2["columns"]]
        values = [by_split.get((_REASONSEG, split), {}).get(metric) for split, metric in pairs]
        names = {"giou": "gIoU", "ciou": "cIoU"}
        titles = [f"{split} {names[metric]}" for split, metric in pairs]
        lines += _table("CoPRS, Table 2: ReasonSeg", titles, table_2["rows"], values, settings)
    return lines


def _table(
    title: str,
    columns: Sequence[str],
    printed: Mapping[str, Sequence[float | None]],
    values: Sequence[float | None],
    settings: Mapping[str, Any],
) -> list[str]:
    body = [["this run", *map(percent, values)]]
    body += [[method, *map(percent, row)] for method, row in printed.items()]
    remark = "Other rows are figures from the paper, of the authors' checkpoints."
    if settings.get("protocol") != "standard":
        remark += f" They are not comparable with the protocol {settings.get('protocol')} of this run."
    return [f"### {title}", "", *markdown_table(["", *columns], body), "", remark, ""]
