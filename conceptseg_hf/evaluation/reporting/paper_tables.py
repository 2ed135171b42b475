"""A run in the layout of the paper's Tables 1, 2, 8 and 10, above the figures that the paper prints there.

Those are shown only where the two compare: where the run was made under the profile and the protocol "released".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...data.suite import SOURCES
from ..metrics import MaskMetrics
from ..records.store import Record
from . import paper_figures
from .aggregate import Row
from .tables import heading_of, markdown_table, percent, provenance_line

_THIS = "this run"
_REASONSEG, _CITYSCAPES = "reasonseg-hf", "cityscapes"  # Table 3 is of the copy on the hub
_RELEASED = "released"


def compares(settings: Mapping[str, Any]) -> bool:
    """Whether a run's numbers compare with the paper's figures, as far as its settings tell."""
    return settings.get("profile") == _RELEASED and settings["protocol"] == _RELEASED


def paper_value(row: Row, metric: str, method: str, settings: Mapping[str, Any]) -> tuple[float, int] | None:
    """What the paper prints for a row, and the number of the table; None if that is nothing, or nothing that compares.

    Means are compared with the paper's only where they go over all of the paper's data sets.

    Args:
        row: A row of a run.
        metric: A metric.
        method: A row of Table 1.
        settings: The settings of the run.
    """
    if not compares(settings):
        return None
    names = [dataset for dataset, _ in row.sources]
    if row.kind == "data set" and row.dataset == _REASONSEG:
        number, found = 3, paper_figures.table_3().get(method, {}).get(row.split, {}).get(metric)
    elif row.kind == "data set":
        number, found = 8, paper_figures.table_8().get(method, {}).get(metric, {}).get(row.dataset)
    else:
        number, printed, key, whole = {
            "group": (1, paper_figures.table_1(), row.group, _sets_of(row.group)),
            "level": (8, paper_figures.table_8(), row.level, _sets_at(row.level)),
            "mean": (1, paper_figures.table_1(), "mean", paper_figures.data_sets()),
        }[row.kind]
        same = sorted(names) == sorted(whole)
        found = printed.get(method, {}).get(metric, {}).get(key) if same else None
    return None if found is None else (found, number)


def remarks(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """What a reader must know before setting this run beside the paper's figures, as lines of text."""
    sets = [row for row in rows if row.kind == "data set"]
    printed = [row for row in sets if _is_printed(row)]
    if not printed:
        names = ", ".join(dict.fromkeys(row.dataset or "these samples" for row in sets))
        return [f"The paper prints no figures for {names}: its layout, this run's numbers alone."]
    if not compares(settings):
        made = f"profile {settings.get('profile') or 'paper'} and protocol {settings['protocol']}"
        notified = (
            f"The paper's figures were made under profile {_RELEASED} and protocol {_RELEASED}, this run under {made}: "
            "they do not compare, and are left out."
        )
        return [notified]
    lines = [
        "Rows with the number of a table are the paper's print (arXiv:2605.20385), of the authors' own checkpoints."
    ]
    if settings.get("prompt_words") == "paper":
        lines.append(
            "This run's prompt has the released structure and the paper's words; --prompt-template gives it the "
            "released ones."
        )
    if settings.get("router") != "adaptive":
        lines.append(
            f"Tables 1 and 8 are of the adaptive router, this run of {settings.get('router')}; Table 10 has both."
        )
    short = [row for row in printed if row.samples != _printed_count(row)]
    if short:
        counts = ", ".join(f"{row.dataset} {row.samples} of {_printed_count(row)}" for row in short)
        lines.append(f"This run has not as many samples as the paper: {counts}.")
    return lines


def table_1(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """The layout of Table 1: groups in columns, "F_w / mIoU" in a cell."""
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
    """The layout of Table 8: data sets in columns, metrics in rows."""
    columns: list[Row] = []
    for level in (row for row in rows if row.kind == "level"):
        columns += [row for row in rows if row.kind == "data set" and row.level == level.level]
        columns += [level] if len(level.sources) > 1 else []
    lines = []
    for metric in settings["metrics"]:
        lines.append([heading_of(metric), _THIS, *(percent(row.values[metric], 2) for row in columns)])
        for method in paper_figures.METHODS:
            printed = [paper_value(row, metric, method, settings) for row in columns]
            tables = sorted({found[1] for found in printed if found is not None})
            if tables:
                name = f"{method} (Table {' and '.join(map(str, tables))})"
                lines.append(["", name, *(percent(_value(found), 2) for found in printed)])
    lines.append(["samples", "", *(str(row.samples) for row in columns)])
    return [
        *markdown_table(["metric", "", *map(_set_title, columns)], lines),
        "",
        provenance_line(settings, _samples(rows)),
    ]


def table_10(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """The layout of Table 10: the share that SAM 3 answered alone, and the scores under this way of routing."""
    sets = [row for row in rows if row.kind == "data set"]
    printed, mode = paper_figures.table(10), settings.get("router")
    beside = compares(settings) and any(mode in printed.get(row.dataset, ()) for row in sets)
    heading = ["concept", "n", "to SAM 3 (%)", "F_w", "mIoU"]
    if beside:
        heading += [f"3B, {mode} (Table 10): to SAM 3 (%)", "F_w", "mIoU"]
    lines = []
    for row in sets:
        scores = [percent(row.values.get(metric), 2) for metric in ("f_w", "miou")]
        lines.append([_set_title(row), str(row.samples), percent(row.shortcut_share), *scores])
        if beside:
            found = printed.get(row.dataset, {})
            fraction = found.get("share") if mode == "adaptive" else None  # printed of this mode alone
            lines[-1] += [percent(fraction), *(percent(value, 2) for value in found.get(mode, (None, None)))]
    return [*markdown_table(heading, lines), "", provenance_line(settings, _samples(rows))]


def table_2(records: Sequence[Record], settings: Mapping[str, Any]) -> list[str]:
    """The layout of Table 2: Cityscapes by class; nothing without Cityscapes.

    A class's IoU is pooled over the images that show it. The others are not asked about, so that what a model would
    have seen in them does not count; how the paper pools is not printed.
    """
    of_classes: dict[str, list[Mapping[str, float]]] = {}
    for record in records:
        if record.get("dataset") == _CITYSCAPES and record["scores"] is not None:
            of_classes.setdefault(record["prompt"], []).append(record["scores"])
    if not of_classes:
        return []
    printed = paper_figures.table(2)
    classes = [name for name in printed["classes"] if name in of_classes]
    classes += [name for name in of_classes if name not in classes]
    values = []
    for name in classes:
        masks = MaskMetrics(settings["protocol"], metrics=("ciou",))
        masks.merge(of_classes[name])
        values.append(masks.compute()["ciou"])
    lines = [[_THIS, *map(percent, values), percent(sum(values) / len(values))]]
    for method, row in printed.items():
        if method != "classes" and compares(settings):
            by_class = dict(zip(printed["classes"], row["miou"], strict=True))
            cells = (percent(by_class.get(name)) for name in classes)
            lines.append([f"{method} (Table 2)", *cells, percent(row["mean"])])
    count = sum(map(len, of_classes.values()))
    return [*markdown_table(["IoU", *classes, "mean"], lines), "", provenance_line(settings, count)]


def _samples(rows: Sequence[Row]) -> int:
    return sum(row.samples for row in rows if row.kind == "data set")


def _is_printed(row: Row) -> bool:
    return row.dataset in (*paper_figures.data_sets(), _REASONSEG)


def _printed_count(row: Row) -> int | None:
    return SOURCES[row.dataset].counts.get(row.split)


def _sets_of(group: str) -> list[str]:
    return [name for name in paper_figures.data_sets() if SOURCES[name].group == group]


def _sets_at(level: str) -> Sequence[str]:
    return paper_figures.data_sets(level) if level in ("CI", "CD", "CR") else ()


def _pair(f_w: float | None, miou: float | None) -> str:
    return f"{percent(f_w)} / {percent(miou)}"


def _ends(row: Row) -> str:
    found = row.intervals.get("miou")
    return "-" if found is None else f"{found.low:.1f} to {found.high:.1f}"


def _value(printed: tuple[float, int] | None) -> float | None:
    return None if printed is None else printed[0]


def _group_title(row: Row) -> str:
    if row.kind == "mean":
        return "mean of the ten groups"
    whole = _sets_of(row.group)
    covered = [name for name, _ in row.sources if name in whole]
    partial = 0 < len(covered) < len(whole)
    return f"{row.group} ({len(covered)} of {len(whole)} data sets)" if partial else row.group


def _set_title(row: Row) -> str:
    if row.kind == "level":
        return f"mean {row.level}"
    source = SOURCES.get(row.dataset)
    if source is None or not source.group:
        return row.group or row.dataset
    return f"{source.title} {row.split}" if source.group == "reasoning" else source.title
