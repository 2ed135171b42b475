"""Right for the right reason? Think, rule and prediction of each sample, judged apart (paper, appendix J).

Each of the three can be right or wrong by itself, which makes eight outcomes: a right mask from a wrong rule is luck,
a right rule with a wrong mask is a fault of grounding. Predictions are judged by their foreground IoU. Think and
rule are judged by people, in a file (`read_judgements`; `write_annotation_sheet` makes one to fill in), or by a
`Judge`; the model that was evaluated is never asked.

Samples on the shortcut have neither think nor rule and are left out, as are failed ones.
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
"""Foreground IoU from which a prediction is right; the paper, whose decomposition is qualitative, names none."""

Judgement = Mapping[str, bool | None]
Judge = Callable[[Record], Judgement | None]
"""Says of a record whether its `think` and its `rule` are right, None for what it does not judge."""

_PARTS = ("think", "rule")
_WORDS = {
    **dict.fromkeys(("true", "yes", "y", "1", "right"), True),
    **dict.fromkeys(("false", "no", "n", "0", "wrong"), False),
    "": None,
}
_KEYS = ("dataset", "split", "sample_id")
_SHEET = (*_KEYS, "prompt", "think_text", "rule_text", "answer", "gt_rule", "iou", "think", "rule")


def exact_rule(record: Record) -> Judgement | None:
    """Judges a rule by the true one, where the benchmark has it (ConceptShapes): they are right if they read the same.

    Case, punctuation and articles do not count. A rule in other words is wrong to this judge, and of the think it says
    nothing: there is more than one way to think rightly.

    Args:
        record: A record.

    Returns:
        The judgement; None without a true rule.
    """
    if record["gt_rule"] is None:
        return None
    return {"think": None, "rule": _normalise(record["rule"]) == _normalise(record["gt_rule"])}


JUDGES: dict[str, Judge] = {"exact-rule": exact_rule}
"""Judges by the name that `--judgements` takes."""


def resolve_judge(judge: str | os.PathLike | Judge, records: Sequence[Record]) -> tuple[str, Judge]:
    """A judge and the name it goes by in a report.

    Args:
        judge: A key of `JUDGES`, a file that `read_judgements` takes, or a judge.
        records: The records that are to be judged.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If it does not fit the records.
    """
    if callable(judge):
        return getattr(judge, "__name__", type(judge).__name__), judge
    if judge in JUDGES:
        return str(judge), JUDGES[judge]
    return Path(judge).name, read_judgements(judge, records)


def check_judge(judge: str | os.PathLike | Judge) -> None:
    """Finds out, before there are records, whether a judge can exist at all.

    Raises:
        ValueError: If it is neither a judge nor a file.
    """
    if not callable(judge) and judge not in JUDGES and not Path(judge).is_file():
        raise ValueError(
            f"judgements {str(judge)!r} is no file; give a .csv or .jsonl file of judgements, or "
            f"{' or '.join(map(repr, JUDGES))}."
        )


def judge_records(records: Sequence[Record], judge: Judge) -> list[Record]:
    """The same records, with a `judgement` where the judge gives one to a reasoned sample."""
    judged = []
    for record in records:
        judgement = judge(record) if record["route"] == "reasoning" else None
        judged.append(record if judgement is None else record | {"judgement": dict(judgement)})
    return judged


def decompose(records: Sequence[Record], threshold: float = CORRECT_IOU) -> list[dict[str, Any]]:
    """Counts the outcomes of judged records.

    Args:
        records: Records, of which those with a `judgement` and a foreground IoU count.
        threshold: Foreground IoU from which a prediction is right.

    Returns:
        A row per outcome: `think`, `rule`, `prediction` (whether right), `count`, and `share` of those that count (None
        if none does). The eight come first, all right to all wrong; outcomes with a part that was not judged (None)
        follow where they occur.
    """
    counts = Counter(
        (*(record["judgement"].get(part) for part in _PARTS), record["foreground_iou"] >= threshold)
        for record in records
        if record.get("judgement") is not None and record["foreground_iou"] is not None
    )
    eight = list(product((True, False), repeat=3))
    partly = [outcome for outcome in product((True, False, None), repeat=3) if outcome not in eight]
    total = sum(counts.values())
    return [
        {
            **dict(zip((*_PARTS, "prediction"), outcome)),
            "count": counts[outcome],
            "share": counts[outcome] / total if total else None,
        }
        for outcome in (*eight, *(outcome for outcome in partly if counts[outcome]))
    ]


def write_annotation_sheet(records: Sequence[Record], path: str | os.PathLike) -> int:
    """Writes a CSV file with one line per reasoned sample, to be filled in and read by `read_judgements`.

    The columns `think` and `rule` are empty, for true or false; the others say what there is to judge.

    Args:
        records: Records.
        path: The file; its folder is made.

    Returns:
        The number of lines.

    Raises:
        FileExistsError: If the file is there already: it may hold somebody's work.
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
    write_file(path, "\ufeff" + sheet.getvalue())  # the byte order mark tells spreadsheets that it is UTF-8
    return len(reasoned)


def read_judgements(path: str | os.PathLike, records: Sequence[Record]) -> Judge:
    """Reads what people have judged.

    Args:
        path: A CSV file with a heading, or JSON objects, one a line (.jsonl): `sample_id`, `think` and `rule` (true or
            false, or empty where not judged), and `dataset` and `split` where the records are of several. A sheet of
            `write_annotation_sheet` also carries the texts that were judged; they must be those of the records.
        records: The records that are judged.

    Returns:
        A judge that knows the samples of the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no such file, or judges samples or texts that are not in the records.
    """
    path = Path(path)
    known: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        for fields in (_KEYS, ("dataset", "sample_id"), ("sample_id",)):
            known.setdefault(_key(record, fields), []).append(record)
    judgements: dict[tuple[str, ...], Judgement] = {}
    for number, row in _rows(path):
        where = f"judgements {str(path)!r}, line {number}"
        names = [name for name in _KEYS if row.get(name)]
        if "sample_id" not in names:
            raise ValueError(f"{where}: there is no sample_id; give that of a record.")
        if "split" in names and "dataset" not in names:
            names.remove("split")
        found = known.get(_key(row, names), [])
        if len(found) != 1:
            raise ValueError(
                f"{where}: sample {row['sample_id']!r} "
                + (
                    "is not among the records."
                    if not found
                    else "is in several data sets; name its dataset and split."
                )
            )
        for part in _PARTS:
            text = row.get(f"{part}_text")
            if text is not None and _one_line(text) != _one_line(found[0][part]):
                raise ValueError(
                    f"{where}: what was judged as {part} of {row['sample_id']!r} is not what the record holds; "
                    "judge the answers of this run."
                )
        key = _key(found[0], _KEYS)
        if key in judgements:
            raise ValueError(f"{where}: sample {row['sample_id']!r} was judged before; leave one line.")
        judgements[key] = {part: _verdict(row.get(part), f"{where}: {part}") for part in _PARTS}

    def judge(record: Record) -> Judgement | None:
        judgement = judgements.get(_key(record, _KEYS))
        return None if judgement is None or set(judgement.values()) == {None} else judgement

    return judge


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a file by their numbers."""
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        heading = text.partition("\n")[0]
        separator = (
            ";" if heading.count(";") > heading.count(",") else ","
        )  # as spreadsheets of some countries write
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
                    f"judgements {str(path)!r}, line {number}: no JSON object; give one a line, or a .csv file."
                )
            rows.append((number, row))
    return rows


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return (*names, *(str(row[name]) for name in names))


def _verdict(value: Any, where: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in _WORDS:
        raise ValueError(f"{where} is {value!r}; give true or false, or leave it empty.")
    return _WORDS[word]


def _one_line(text: str | None) -> str:
    """A text as it comes back from a spreadsheet, which may change its white space."""
    return " ".join((text or "").split())


def _normalise(text: str | None) -> str | None:
    if text is None:
        return None
    return " ".join(word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the"))
