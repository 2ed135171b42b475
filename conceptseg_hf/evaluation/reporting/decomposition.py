"""Decomposition: whether think, rule and prediction of each sample are right, judged separately (paper, appendix J).

Each of the three can be right or wrong independently, which gives eight outcomes: a right mask from a wrong rule is
luck, and a right rule with a wrong mask is a grounding error. Predictions are judged by their foreground IoU. Think and
rule are judged by people, in a file (`read_judgements`; `write_annotation_sheet` writes a sheet to fill in), or by a
`Judge`. The evaluated model is not used as a judge.

Samples on the shortcut have neither think nor rule and are excluded, as are failed samples.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ...data.paths import read_text
from ...writing import write_file
from ..records.store import Record

CORRECT_IOU = 0.5
"""Minimum foreground IoU of a right prediction; the paper's decomposition is qualitative and gives no threshold."""

Judgement = Mapping[str, bool | None]
Judge = Callable[[Record], Judgement | None]
"""Returns whether the `think` and the `rule` of a record are right; None for anything that it does not judge."""

_PARTS = ("think", "rule")
_VERDICTS = {
    **dict.fromkeys(("true", "yes", "y", "1", "right"), True),
    **dict.fromkeys(("false", "no", "n", "0", "wrong"), False),
    "": None,
}
_KEYS = ("dataset", "split", "sample_id")
_SHEET = (*_KEYS, "prompt", "think_text", "rule_text", "answer", "gt_rule", "iou", "think", "rule")


def exact_rule(record: Record) -> Judgement | None:
    """Judge a rule by string comparison with the ground truth rule, where the benchmark has one (ConceptShapes).

    Case, punctuation and articles are ignored. A paraphrase of the rule counts as wrong. The think is not judged, as
    there is more than one correct way to reason.

    Args:
        record: A record.

    Returns:
        The judgement; None without a ground truth rule.
    """
    if record["gt_rule"] is None:
        return None
    return {"think": None, "rule": _normalize(record["rule"]) == _normalize(record["gt_rule"])}


JUDGES: dict[str, Judge] = {"exact-rule": exact_rule}
"""Judges by their name for `--judgements`."""


def resolve_judge(judge: str | os.PathLike | Judge, records: Sequence[Record]) -> tuple[str, Judge]:
    """Return a judge and its name in reports.

    Args:
        judge: A key of `JUDGES`, a file for `read_judgements`, or a judge.
        records: The records to be judged.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is invalid or does not match the records.
    """
    if callable(judge):
        return getattr(judge, "__name__", type(judge).__name__), judge
    if judge in JUDGES:
        return str(judge), JUDGES[judge]
    return Path(judge).name, read_judgements(judge, records)


def check_judge(judge: str | os.PathLike | Judge) -> None:
    """Check that a judge exists, before any sample is evaluated.

    Raises:
        ValueError: If it is neither a judge nor a file.
    """
    if not callable(judge) and judge not in JUDGES and not Path(judge).is_file():
        raise ValueError(
            f"judgements {str(judge)!r} is not a file; give a .csv or .jsonl file of judgements, or "
            f"{' or '.join(map(repr, JUDGES))}."
        )


def judge_records(records: Sequence[Record], judge: Judge) -> list[Record]:
    """Return the records, with a `judgement` for each reasoned sample that the judge judges."""
    judged = []
    for record in records:
        judgement = judge(record) if record["route"] == "reasoning" else None
        judged.append(record if judgement is None else record | {"judgement": dict(judgement)})
    return judged


def decompose(records: Sequence[Record], threshold: float = CORRECT_IOU) -> list[dict[str, Any]]:
    """Count the outcomes of judged records.

    Args:
        records: The records; only those with a `judgement` and a foreground IoU count.
        threshold: Minimum foreground IoU of a right prediction.

    Returns:
        A row per outcome: `think`, `rule`, `prediction` (whether right), `count`, and `share`, the fraction of the
        records that count (None if there are none). The eight outcomes come first, from all right to all wrong;
        outcomes with a part that was not judged (None) follow if they occur.
    """
    counts = Counter(
        (*(record["judgement"].get(part) for part in _PARTS), record["foreground_iou"] >= threshold)
        for record in records
        if record.get("judgement") is not None and record["foreground_iou"] is not None
    )
    complete = list(product((True, False), repeat=3))
    partial = [outcome for outcome in product((True, False, None), repeat=3) if outcome not in complete]
    total = sum(counts.values())
    return [
        {
            **dict(zip((*_PARTS, "prediction"), outcome)),
            "count": counts[outcome],
            "share": counts[outcome] / total if total else None,
        }
        for outcome in (*complete, *(outcome for outcome in partial if counts[outcome]))
    ]


def write_annotation_sheet(records: Sequence[Record], path: str | os.PathLike) -> int:
    """Write a CSV file with one line per reasoned sample, to be filled in and read by `read_judgements`.

    The columns `think` and `rule` are left empty for true or false; the other columns show what is to be judged.

    Args:
        records: The records.
        path: The file; its folder is created.

    Returns:
        The number of lines.

    Raises:
        FileExistsError: If the file exists already, as it may be filled in.
    """
    reasoned = [record for record in records if record["route"] == "reasoning"]
    if Path(path).exists():
        raise FileExistsError(
            f"annotation sheet {str(path)!r} exists already and may be filled in; give another name."
        )
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, _SHEET)
    writer.writeheader()
    for record in reasoned:
        iou = record["foreground_iou"]
        values = {name: record[name] for name in (*_KEYS, "prompt", "answer", "gt_rule")}
        texts = {f"{part}_text": record[part] for part in _PARTS}
        writer.writerow(values | texts | {"iou": "" if iou is None else f"{iou:.3f}"})
    write_file(path, "\ufeff" + sheet.getvalue())  # spreadsheet programs detect UTF-8 by its byte order mark
    return len(reasoned)


def read_judgements(path: str | os.PathLike, records: Sequence[Record]) -> Judge:
    """Read human judgements.

    Args:
        path: A CSV file with a header, or a .jsonl file with one JSON object per line: `sample_id`, `think` and `rule`
            (true or false, or empty if not judged), and `dataset` and `split` if the records are of several datasets. A
            sheet of `write_annotation_sheet` also has the judged strings, which must match the records.
        records: The records to be judged.

    Returns:
        A judge for the samples of the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is invalid, or has samples or judged strings that are not in the records.
    """
    path = Path(path)
    records_by_key: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        for fields in (_KEYS, ("dataset", "sample_id"), ("sample_id",)):
            records_by_key.setdefault(_key(record, fields), []).append(record)
    judgements: dict[tuple[str, ...], Judgement] = {}
    for number, row in _rows(path):
        where = f"judgements {str(path)!r}, line {number}"
        names = [name for name in _KEYS if row.get(name)]
        if "sample_id" not in names:
            raise ValueError(f"{where}: sample_id is missing; give the sample_id of a record.")
        if "split" in names and "dataset" not in names:
            names.remove("split")
        matches = records_by_key.get(_key(row, names), [])
        if len(matches) != 1:
            raise ValueError(
                f"{where}: sample {row['sample_id']!r} "
                + (
                    "is not among the records; judge the samples of this run."
                    if not matches
                    else "is in several datasets; give its dataset and split."
                )
            )
        for part in _PARTS:
            text = row.get(f"{part}_text")
            if text is not None and _one_line(text) != _one_line(matches[0][part]):
                raise ValueError(
                    f"{where}: {part}_text of sample {row['sample_id']!r} differs from the {part} of the record; "
                    "judge the completions of this run."
                )
        key = _key(matches[0], _KEYS)
        if key in judgements:
            raise ValueError(f"{where}: sample {row['sample_id']!r} is judged twice; keep one of the lines.")
        judgements[key] = {part: _verdict(row.get(part), f"{where}: {part}") for part in _PARTS}

    def judge(record: Record) -> Judgement | None:
        judgement = judgements.get(_key(record, _KEYS))
        return None if judgement is None or set(judgement.values()) == {None} else judgement

    return judge


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a file with their line numbers."""
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        heading = text.partition("\n")[0]
        # Spreadsheet programs separate by semicolons in some locales.
        separator = ";" if heading.count(";") > heading.count(",") else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        return [(reader.line_num, row) for row in reader]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(
                    f"judgements {str(path)!r}, line {number} is not a JSON object; give one object per line, or a "
                    ".csv file."
                )
            rows.append((number, row))
    return rows


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return (*names, *(str(row[name]) for name in names))


def _verdict(value: Any, where: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in _VERDICTS:
        raise ValueError(f"{where} is {value!r}; give true or false, or leave it empty.")
    return _VERDICTS[word]


def _one_line(text: str | None) -> str:
    """Collapse whitespace, which a spreadsheet program may have changed."""
    return " ".join((text or "").split())


def _normalize(text: str | None) -> str | None:
    if text is None:
        return None
    return " ".join(word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the"))
