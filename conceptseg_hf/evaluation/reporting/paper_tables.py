"""The results of a run in the layout of the paper's Tables 1, 2, 8 and 10, with the paper's figures below them.

The paper's figures are only shown for comparable runs: those with the profile and the protocol "released".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...data.registry import GENERATED
from ...data.suite import SOURCES
from ..metrics import MaskMetrics
from ..records.store import Record
from . import paper_figures
from .aggregate import Row
from .tables import heading_of, markdown_table, percent, provenance_line

_THIS = "this run"
_REASONSEG, _CITYSCAPES = "reasonseg-hf", "cityscapes"  # Table 3 uses the copy of ReasonSeg on the hub
_RELEASED = "released"


def compares(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a run make its numbers comparable with the paper's figures."""
    return settings.get("profile") == _RELEASED and settings["protocol"] == _RELEASED


def paper_value(row: Row, metric: str, method: str, settings: Mapping[str, Any]) -> tuple[float, int] | None:
    """Return the paper's figure for a row and the number of its table; None if there is no comparable figure.

    Means are only compared with the paper's if they cover all of the paper's datasets.

    Args:
        row: A row of a run.
        metric: A metric.
        method: A row of Table 1.
        settings: The settings of the run.
    """
    if not compares(settings):
        return None
    datasets = [dataset for dataset, _ in row.sources]
    if row.kind == "data set" and row.dataset == _REASONSEG:
        table_number, figure = 3, paper_figures.table_3().get(method, {}).get(row.split, {}).get(metric)
    elif row.kind == "data set":
        table_number, figure = 8, paper_figures.table_8().get(method, {}).get(metric, {}).get(row.dataset)
    else:
        table_number, table, key, paper_datasets = {
            "group": (1, paper_figures.table_1(), row.group, _datasets_of_group(row.group)),
            "level": (8, paper_figures.table_8(), row.level, _datasets_of_level(row.level)),
            "mean": (1, paper_figures.table_1(), "mean", paper_figures.data_sets()),
        }[row.kind]
        is_complete = sorted(datasets) == sorted(paper_datasets)
        figure = table.get(method, {}).get(metric, {}).get(key) if is_complete else None
    return None if figure is None else (figure, table_number)


def remarks(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Return notes on the comparison of this run with the paper's figures, as lines of text."""
    dataset_rows = [row for row in rows if row.kind == "data set"]
    printed = [row for row in dataset_rows if _is_printed(row)]
    if not printed:
        names = ", ".join(dict.fromkeys(row.dataset or "these samples" for row in dataset_rows))
        return [
            f"The paper prints no figures for {names}; the tables have the paper's layout, but only this run's numbers."
        ]
    if not compares(settings):
        made = f"profile {settings.get('profile') or 'paper'} and protocol {settings['protocol']}"
        remark = (
            f"The paper's figures were made under profile {_RELEASED} and protocol {_RELEASED}, this run under {made}; "
            "they are not comparable and are omitted."
        )
        return [remark]
    lines = [
        "Rows with a table number are figures from the paper (arXiv:2605.20385), of the authors' own checkpoints."
    ]
    if settings.get("prompt_words") == "paper":
        lines.append(
            "The prompt of this run has the released structure and the paper's wording; use --prompt-template for the "
            "released wording."
        )
    if settings.get("router") != "adaptive":
        lines.append(
            f"Tables 1 and 8 use the adaptive router, this run uses {settings.get('router')}; Table 10 has both."
        )
    differing = [row for row in printed if row.samples != _printed_count(row)]
    if differing:
        counts = ", ".join(f"{row.dataset} {row.samples} of {_printed_count(row)}" for row in differing)
        lines.append(f"This run does not have the same number of samples as the paper: {counts}.")
    return lines


def table_1(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Return Table 1: groups in columns, "F_w / mIoU" in a cell."""
    columns = [row for row in rows if row.kind in ("group", "mean")]
    lines = [[_THIS, *(_pair(row.values.get("f_w"), row.values.get("miou")) for row in columns)]]
    if any(row.intervals.get("miou") for row in columns):
        lines.append(["mIoU, 95 % interval", *(_ends(row) for row in columns)])
    for method in paper_figures.table_1():
        printed = [
            [_value(paper_value(row, metric, method, settings)) for metric in ("f_w", "miou")]
            for row in columns
        ]
        if any(value is not None for pair in printed for value in pair):
            lines.append([f"{method} (Table 1)", *(_pair(*pair) for pair in printed)])
    lines.append(["samples", *(str(row.samples) for row in columns)])
    return [
        *markdown_table(["F_w / mIoU", *map(_group_title, columns)], lines),
        "",
        provenance_line(settings, _samples(rows)),
    ]


def table_8(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Return Table 8: datasets in columns, metrics in rows."""
    columns: list[Row] = []
    for level in (row for row in rows if row.kind == "level"):
        columns += [row for row in rows if row.kind == "data set" and row.level == level.level]
        columns += [level] if len(level.sources) > 1 else []
    lines = []
    for metric in settings["metrics"]:
        lines.append([heading_of(metric), _THIS, *(percent(row.values[metric], 2) for row in columns)])
        for method in paper_figures.METHODS:
            printed = [paper_value(row, metric, method, settings) for row in columns]
            tables = sorted({pair[1] for pair in printed if pair is not None})
            if tables:
                name = f"{method} (Table {' and '.join(map(str, tables))})"
                lines.append(["", name, *(percent(_value(pair), 2) for pair in printed)])
    lines.append(["samples", "", *(str(row.samples) for row in columns)])
    return [
        *markdown_table(["metric", "", *map(_dataset_title, columns)], lines),
        "",
        provenance_line(settings, _samples(rows)),
    ]


def table_10(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Return Table 10: the percentage of samples that SAM 3 answered alone, and the scores under this router mode."""
    dataset_rows = [row for row in rows if row.kind == "data set"]
    printed, mode = paper_figures.table(10), settings.get("router")
    show_paper = compares(settings) and any(mode in printed.get(row.dataset, ()) for row in dataset_rows)
    heading = ["concept", "n", "to SAM 3 (%)", "F_w", "mIoU"]
    if show_paper:
        heading += [f"3B, {mode} (Table 10): to SAM 3 (%)", "F_w", "mIoU"]
    lines = []
    for row in dataset_rows:
        scores = [percent(row.values.get(metric), 2) for metric in ("f_w", "miou")]
        lines.append([_dataset_title(row), str(row.samples), percent(row.shortcut_share), *scores])
        if show_paper:
            figures = printed.get(row.dataset, {})
            # The paper prints the percentage for the adaptive router only.
            shortcut = figures.get("share") if mode == "adaptive" else None
            lines[-1] += [
                percent(shortcut),
                *(percent(value, 2) for value in figures.get(mode, (None, None))),
            ]
    return [*markdown_table(heading, lines), "", provenance_line(settings, _samples(rows))]


def table_2(records: Sequence[Record], settings: Mapping[str, Any]) -> list[str]:
    """Return Table 2: Cityscapes by class; empty without Cityscapes.

    The IoU of a class is pooled over the images that show it. The class is not evaluated on other images, so false
    positives there do not count; the paper does not state how it pools.
    """
    scores_by_class: dict[str, list[Mapping[str, float]]] = {}
    for record in records:
        if record.get("dataset") == _CITYSCAPES and record["scores"] is not None:
            scores_by_class.setdefault(record["prompt"], []).append(record["scores"])
    if not scores_by_class:
        return []
    printed = paper_figures.table(2)
    classes = [name for name in printed["classes"] if name in scores_by_class]
    classes += [name for name in scores_by_class if name not in classes]
    values = []
    for name in classes:
        masks = MaskMetrics(settings["protocol"], metrics=("ciou",))
        masks.merge(scores_by_class[name])
        values.append(masks.compute()["ciou"])
    lines = [[_THIS, *map(percent, values), percent(sum(values) / len(values))]]
    for method, row in printed.items():
        if method != "classes" and compares(settings):
            by_class = dict(zip(printed["classes"], row["miou"], strict=True))
            cells = (percent(by_class.get(name)) for name in classes)
            lines.append([f"{method} (Table 2)", *cells, percent(row["mean"])])
    count = sum(map(len, scores_by_class.values()))
    return [*markdown_table(["IoU", *classes, "mean"], lines), "", provenance_line(settings, count)]


def _samples(rows: Sequence[Row]) -> int:
    return sum(row.samples for row in rows if row.kind == "data set")


def _is_printed(row: Row) -> bool:
    return row.dataset in (*paper_figures.data_sets(), _REASONSEG)


def _printed_count(row: Row) -> int | None:
    return SOURCES[row.dataset].counts.get(row.split)


def _datasets_of_group(group: str) -> list[str]:
    return [name for name in paper_figures.data_sets() if SOURCES[name].group == group]


def _datasets_of_level(level: str) -> Sequence[str]:
    return paper_figures.data_sets(level) if level in ("CI", "CD", "CR") else ()


def _pair(f_w: float | None, miou: float | None) -> str:
    return f"{percent(f_w)} / {percent(miou)}"


def _ends(row: Row) -> str:
    interval = row.intervals.get("miou")
    return "-" if interval is None else f"{interval.low:.1f} to {interval.high:.1f}"


def _value(printed: tuple[float, int] | None) -> float | None:
    return None if printed is None else printed[0]


def _group_title(row: Row) -> str:
    if row.kind == "mean":
        return "mean of the ten groups"
    datasets = _datasets_of_group(row.group)
    covered = [name for name, _ in row.sources if name in datasets]
    is_partial = 0 < len(covered) < len(datasets)
    return f"{row.group} ({len(covered)} of {len(datasets)} datasets)" if is_partial else row.group


def _dataset_title(row: Row) -> str:
    if row.kind == "level":
        return f"mean {row.level}"
    source = SOURCES.get(row.dataset)
    if source is None and row.dataset not in GENERATED:
        return row.dataset or row.group
    if source is None or not source.group:
        return row.group or row.dataset
    return f"{source.title} {row.split}" if source.group == "reasoning" else source.title
