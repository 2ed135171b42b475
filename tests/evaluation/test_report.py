"""Tests of reports: the paper's layout, when the paper's figures are shown, and the provenance of every number."""

from __future__ import annotations

import csv
import io
import json

import pytest

from conceptseg_hf.data import SOURCES
from conceptseg_hf.evaluation import EvaluationReport
from conceptseg_hf.evaluation.reporting import paper_figures
from conceptseg_hf.evaluation.reporting.aggregate import aggregate
from conceptseg_hf.evaluation.reporting.paper_tables import paper_value

METRICS = ("miou", "giou", "ciou", "mae", "ber", "mdice")
SETTINGS = {
    "benchmark": "mine",
    "split": "test",
    "seed": 42,
    "protocol": "released",
    "profile": "released",
    "router": "adaptive",
    "model": "/somewhere/checkpoints/small",
    "weights": "abc",
    "metrics": list(METRICS),
}


def of_source(record_like, name, iou, **changes):
    source = SOURCES[name]
    return record_like(iou, dataset=name, level=source.level, group=source.group, split="test", **changes)


@pytest.fixture()
def suite(record_like):
    """One sample of each dataset of Table 1; those of the group "optical property" have different IoUs."""
    return [
        of_source(record_like, name, 0.5 if name == "transparent1024" else 1.0)
        for name in paper_figures.data_sets()
    ]


def rows_of(records, **changes):
    report = EvaluationReport(records, SETTINGS | changes)
    return report, {(row.kind, row.level, row.group, row.sources[0][0]): row for row in report.rows}


def cells(markdown, start):
    line = next(line for line in markdown.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_groups_are_means_over_datasets_not_over_samples(record_like):
    records = [of_source(record_like, "Shadow_detection", 1.0) | {"sample_id": str(i)} for i in range(3)]
    records.append(of_source(record_like, "transparent1024", 0.5))
    rows = aggregate(records, "standard", METRICS)
    kinds = [(row.kind, row.samples, row.values["giou"]) for row in rows]
    assert kinds == [("data set", 3, 100), ("data set", 1, 50), ("group", 4, 75), ("level", 4, 75)]
    assert rows[2].intervals["miou"] is None, "a dataset has only one sample"
    rows = aggregate([*records, records[-1]], "standard", METRICS)
    assert rows[2].intervals["miou"].mean == pytest.approx(rows[2].values["miou"])


def test_mean_requires_all_ten_groups(suite):
    _, rows = rows_of(suite)
    mean = next(row for row in rows.values() if row.kind == "mean")
    assert mean.values["giou"] == pytest.approx(97.5)  # nine groups of 100 and one of 75
    assert len(mean.sources) == 20
    _, rows = rows_of(suite[:-2])
    assert all(row.kind != "mean" for row in rows.values())


def test_paper_figures_are_only_compared_with_complete_rows(suite):
    _, rows = rows_of(suite)
    mean = next(row for row in rows.values() if row.kind == "mean")
    assert paper_value(mean, "miou", "ConceptSeg-R1-7B", SETTINGS) == (82.8, 1)
    assert paper_value(mean, "mae", "ConceptSeg-R1-7B", SETTINGS) is None
    level = rows["level", "CD", "", "Shadow_detection"]
    assert paper_value(level, "f_w", "ConceptSeg-R1-3B", SETTINGS) == (76.55, 8)
    lesion = rows["group", "CD", "medical lesion", "Polyp"]
    assert paper_value(lesion, "miou", "SAM 3", SETTINGS) == (48.9, 1)
    _, rows = rows_of([record for record in suite if record["dataset"] != "isic2018"])
    assert paper_value(rows["group", "CD", "medical lesion", "Polyp"], "miou", "SAM 3", SETTINGS) is None
    assert (
        paper_value(rows["level", "CD", "", "Shadow_detection"], "f_w", "ConceptSeg-R1-3B", SETTINGS) is None
    )
    polyp = rows["data set", "CD", "medical lesion", "Polyp"]
    assert paper_value(polyp, "miou", "ConceptSeg-R1-3B", SETTINGS) == (74.31, 8)


def test_markdown_shows_the_paper_figures(suite):
    report, _ = rows_of(suite)
    text = report.to_markdown()
    head = cells(text, "| F_w / mIoU")
    assert head[1:] == [*paper_figures.groups(), "mean of the ten groups"]
    assert cells(text, "| ConceptSeg-R1-7B (Table 1)")[-1] == "74.9 / 82.8"
    assert cells(text, "| SAM 3 (Table 1)")[-1] == "- / -"
    assert len(cells(text, "| this run")) == 12
    assert "not have the same number of samples as the paper: coco2014_Living 1 of 1700" in text
    assert cells(text, "| iNaturalist ultra rare")[1:] == [
        "1",
        "100.0",
        "-",
        "100.00",
        "7.7",
        "96.45",
        "96.87",
    ]
    assert "3B, adaptive (Table 10): to SAM 3 (%)" in text


def test_markdown_reports_partial_groups_and_the_router(suite):
    records = [record for record in suite if record["dataset"] == "Polyp"]
    report, _ = rows_of(records, router="sam_only")
    text = report.to_markdown()
    assert "medical lesion (1 of 3 datasets)" in text
    assert "this run uses sam_only" in text
    assert "3B, sam_only (Table 10)" in text and "17.46" in text


@pytest.mark.parametrize(
    ("protocol", "profile", "made"),
    [
        ("standard", None, "profile paper and protocol standard"),
        ("paper", None, "profile paper and protocol paper"),
        ("released", None, "profile paper and protocol released"),
        ("paper", "released but protocol paper", "profile released but protocol paper and protocol paper"),
        (
            "released",
            "released but mosaic.grid 3",
            "profile released but mosaic.grid 3 and protocol released",
        ),
    ],
)
def test_paper_figures_are_omitted_for_runs_with_other_settings(suite, protocol, profile, made):
    """The paper's figures come from the released code and would be misleading for a run with any other setting."""
    report, rows = rows_of(suite, protocol=protocol, profile=profile)
    mean = next(row for row in rows.values() if row.kind == "mean")
    assert paper_value(mean, "miou", "ConceptSeg-R1-7B", report.settings) is None
    text = report.to_markdown()
    assert f"this run under {made}; they are not comparable" in text
    assert "(Table" not in text and "82.8" not in text
    assert not any(line["paper table"] for line in csv.DictReader(io.StringIO(report.to_csv())))
    assert not any(row["paper"] for row in report.to_dict()["paper_layout"])


def test_markdown_reports_the_wording_of_the_prompt(suite):
    report, _ = rows_of(suite, prompt_words="paper")
    assert "the released structure and the paper's wording; use --prompt-template" in report.to_markdown()
    assert "the paper's wording" not in rows_of(suite)[0].to_markdown()


def test_layout_for_datasets_without_paper_figures(record_like):
    report, _ = rows_of([record_like(1.0), record_like(0.5)])
    text = report.to_markdown()
    assert "The paper prints no figures for mine" in text
    assert "(Table" not in text
    assert cells(text, "| this run")[1].endswith("/ " + f"{report.rows[0].values['miou']:.1f}")


def test_reasonseg_and_cityscapes_have_separate_tables(record_like):
    records = [of_source(record_like, name, 1.0) for name in ("reasonseg-hf", "reasonseg")]
    records += [
        of_source(record_like, "cityscapes", iou) | {"prompt": name}
        for name, iou in (("road", 1.0), ("bus", 0.5))
    ]
    report, rows = rows_of(records)
    hub, original = (rows["data set", "CR", "reasoning", name] for name in ("reasonseg-hf", "reasonseg"))
    assert paper_value(hub, "ciou", "ConceptSeg-R1-7B", SETTINGS) == (59.3, 3)  # Table 3 uses the hub's copy
    assert paper_value(original, "ciou", "ConceptSeg-R1-7B", SETTINGS) is None
    text = report.to_markdown()
    assert "ConceptSeg-R1-7B (Table 3)" in text
    assert cells(text, "| IoU ") == ["IoU", "road", "bus", "mean"]
    assert cells(text, "| ConceptSeg-R1-3B (Table 2)") == [
        "ConceptSeg-R1-3B (Table 2)",
        "97.9",
        "62.3",
        "62.6",
    ]
    assert "| this run" in text and "75.0" in text


def test_every_number_has_its_provenance(suite, tmp_path):
    report, _ = rows_of(suite)
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(lines) == len(report.rows) * (len(METRICS) + 1)
    for line in lines:
        assert (line["protocol"], line["seed"], line["router"], line["weights"]) == (
            "released",
            "42",
            "adaptive",
            "abc",
        )
        assert line["checkpoint"] == "small"
        assert int(line["samples"]) >= 1 and line["benchmark"] and line["split"] == "test"
    polyp = next(
        line
        for line in lines
        if (line["benchmark"], line["metric"], line["row"]) == ("Polyp", "miou", "data set")
    )
    assert (polyp["paper ConceptSeg-R1-3B"], polyp["paper table"]) == ("74.31", "8")
    for text in report.to_markdown().split("\n\n"):
        if text.startswith("benchmark "):
            assert (
                "protocol released" in text
                and "profile released" in text
                and "seed 42" in text
                and "n 20" in text
            )
    report.write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["provenance"]["samples"] == 20
    assert content["paper_layout"][0]["paper"]["SAM 3"]["miou"] == {"value": 88.66, "table": 8}
    assert (tmp_path / "report.csv").read_text() == report.to_csv()
    assert not (tmp_path / "gallery.html").exists()


def test_tables_support_box_only_samples_and_failures(record_like):
    records = [record_like(1.0, scores=None, foreground_iou=None, error="broken.", route=None)]
    report, _ = rows_of(records)
    assert report.rows[0].values["miou"] is None
    assert report.rows[0].shortcut_share is None
    assert "broken." in report.to_markdown()
    assert report.table[-1]["foreground_iou_interval"] is None


def test_routing_regret_has_columns_only_if_recorded(record_like):
    report, _ = rows_of([record_like(1.0, routing_regret=0.0), record_like(0.5, routing_regret=0.5)])
    assert report.table[-1]["routing_regret"] == 0.25
    assert report.table[-1]["regretted"] == 0.5
    assert "regretted" in report.sample_tables()
    report, _ = rows_of([record_like(1.0)])
    assert "regret" not in report.sample_tables()


def test_markdown_shows_the_outcomes_of_judgements(record_like):
    records = [record_like(1.0, judgement={"think": True, "rule": False}), record_like(1.0)]
    report, _ = rows_of(records, judgements="exact-rule", prediction_threshold=0.5)
    text = report.to_markdown()
    assert cells(text, "| right | wrong | right") == ["right", "wrong", "right", "1", "100.0"]
    assert "1 of 2 samples are judged" in text
    assert sum(row["count"] for row in report.to_dict()["outcomes"]) == 1
