"""Tests of the decomposition: the eight outcomes, and the assignment of judgements to records."""

from __future__ import annotations

import csv
import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptseg_hf.evaluation.reporting.decomposition import (
    check_judge,
    decompose,
    exact_rule,
    judge_records,
    read_judgements,
    resolve_judge,
    write_annotation_sheet,
)


def a_record(number: int = 0, **changes) -> dict:
    return {
        "sample_id": f"test-{number}",
        "dataset": "b",
        "split": "test",
        "route": "reasoning",
        "prompt": "the odd one out",
        "think": "it differs,\nsays the model; really",
        "rule": "the object unlike the others",
        "answer": "red star",
        "gt_rule": "the object unlike the others",
        "foreground_iou": 0.7,
    } | changes


def judged(think, rule, iou) -> dict:
    return a_record(foreground_iou=iou, judgement={"think": think, "rule": rule})


def test_decompose_counts_eight_outcomes():
    records = [
        judged(True, True, 0.5),  # at the threshold a prediction is right
        judged(True, True, 0.49),
        judged(False, True, 0.9),
        judged(False, True, 0.8),
        a_record(),  # not judged
        judged(True, True, None),  # no mask to compare with
    ]
    rows = decompose(records)
    assert [(row["think"], row["rule"], row["prediction"]) for row in rows] == list(
        product((True, False), repeat=3)
    )
    counts = {tuple(row[name] for name in ("think", "rule", "prediction")): row["count"] for row in rows}
    assert (counts[True, True, True], counts[True, True, False], counts[False, True, True]) == (1, 1, 2)
    assert sum(counts.values()) == 4 and sum(row["share"] for row in rows) == 1
    assert decompose(records, threshold=0.45)[0]["count"] == 2
    assert {row["share"] for row in decompose([])} == {None}


@given(
    st.lists(
        st.tuples(
            st.sampled_from((True, False, None)), st.sampled_from((True, False, None)), st.floats(0, 1)
        ),
        max_size=30,
    )
)
def test_every_judged_record_has_one_outcome(parts):
    rows = decompose([judged(*part) for part in parts])
    assert sum(row["count"] for row in rows) == len(parts)
    assert len({(row["think"], row["rule"], row["prediction"]) for row in rows}) == len(rows) >= 8
    for row in rows:
        matching = [
            part
            for part in parts
            if part[:2] == (row["think"], row["rule"]) and (part[2] >= 0.5) == row["prediction"]
        ]
        assert row["count"] == len(matching)


def test_exact_rule_compares_words_and_does_not_judge_the_think():
    assert exact_rule(a_record(rule="The object, unlike others!")) == {"think": None, "rule": True}
    assert exact_rule(a_record(rule="the object that stands out")) == {"think": None, "rule": False}
    assert exact_rule(a_record(rule=None)) == {"think": None, "rule": False}
    assert exact_rule(a_record(gt_rule=None)) is None
    (row,) = [row for row in decompose(judge_records([a_record()], exact_rule)) if row["count"]]
    assert (row["think"], row["rule"], row["prediction"]) == (None, True, True)


def test_only_reasoned_samples_are_judged():
    records = judge_records([a_record(), a_record(1, route="shortcut"), a_record(2, route=None)], exact_rule)
    assert ["judgement" in record for record in records] == [True, False, False]


def test_reads_a_completed_annotation_sheet(tmp_path):
    records = [a_record(number, rule=f"rule {number}, straße") for number in range(4)]
    records.append(a_record(4, route="shortcut"))
    path = tmp_path / "sheet.csv"
    assert write_annotation_sheet(records, path) == 4
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    with pytest.raises(FileExistsError, match="exists already"):
        write_annotation_sheet(records, path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rule_text"] for row in rows] == [record["rule"] for record in records[:4]]
    assert rows[0]["iou"] == "0.700" and {row["think"] + row["rule"] for row in rows} == {""}
    for row, (think, rule) in zip(rows, [("yes", "no"), ("TRUE", ""), ("0", "wrong"), ("", "")]):
        row["think"], row["rule"] = think, rule
    for separator in ",;":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
        name, judge = resolve_judge(path, records)
        assert name == "sheet.csv"
        assert [record.get("judgement") for record in judge_records(records, judge)] == [
            {"think": True, "rule": False},
            {"think": True, "rule": None},
            {"think": False, "rule": False},
            None,
            None,
        ]


def test_reads_json_lines_with_and_without_dataset(tmp_path):
    records = [a_record(), a_record(1), a_record(1, dataset="c")]
    path = tmp_path / "judgements.jsonl"
    lines = [
        {"sample_id": "test-0", "think": True, "rule": False},
        {"sample_id": "test-1", "dataset": "c", "rule": True},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    judge = read_judgements(path, records)
    assert [judge(record) for record in records] == [
        {"think": True, "rule": False},
        None,
        {"think": None, "rule": True},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"think": true}', "line 1: sample_id is missing"),
        ('{"sample_id": "test-9"}', "'test-9' is not among the records"),
        ('{"sample_id": "test-1"}', "in several datasets"),
        ('{"sample_id": "test-0"}\n{"sample_id": "test-0"}', "line 2: sample 'test-0' is judged twice"),
        ('{"sample_id": "test-0", "rule": "perhaps"}', "rule is 'perhaps'; give true or false"),
        ('{"sample_id": "test-0", "rule_text": "another"}', "differs from the rule of the record"),
        ("[1]", "not a JSON object"),
        ("sample_id,think", "not a JSON object"),
    ],
)
def test_invalid_judgements_raise(tmp_path, text, message):
    path = tmp_path / "judgements.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_judgements(path, [a_record(), a_record(1), a_record(1, dataset="c")])
    assert "\n" not in str(caught.value)


def test_check_judge_rejects_missing_files(tmp_path):
    check_judge("exact-rule")
    check_judge(exact_rule)
    with pytest.raises(ValueError, match="is not a file"):
        check_judge(tmp_path / "missing.csv")
