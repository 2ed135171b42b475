"""Tests of the paired comparison: pairing, rejected inputs, and the sign of differences."""

from __future__ import annotations

import csv
import io
import json

import pytest

from conceptseg_hf.data import load_benchmark
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.evaluation.reporting.comparison import compare

SETTINGS = {
    "benchmark": "mine",
    "split": "test",
    "protocol": "standard",
    "router": "adaptive",
    "metrics": ["miou"],
}


@pytest.fixture()
def write_run(tmp_path, record_like):
    """Write an output folder with samples of the given foreground IoUs."""

    def write(name, ious, records=None, **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if records is None:
            records = [record_like(iou, sample_id=f"s{index}") for index, iou in enumerate(ious)]
        lines = [json.dumps({"index": index, **record}) for index, record in enumerate(records)]
        (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
        return folder

    return write


def test_wins_ties_and_losses_of_the_second_run(write_run):
    first, second = (
        write_run("a", [0.2, 0.5, 0.5, 0.9]),
        write_run("b", [0.6, 0.5, 0.4, 1.0], router="sam_only"),
    )
    result = compare(first, second)
    assert result.names == ("a", "b")
    row = result.table[-1]
    assert (row.level, row.group) == ("all", "all")
    assert (row.wins, row.ties, row.losses) == (2, 1, 1)
    assert row.difference.mean == pytest.approx(0.1)
    assert row.second - row.first == pytest.approx(row.difference.mean)
    assert row.difference.low < 0.1 < row.difference.high
    swapped = compare(second, first).table[-1]
    assert swapped.difference.mean == pytest.approx(-0.1)
    assert (swapped.wins, swapped.losses) == (1, 2)
    assert "router adaptive / sam_only" in " ".join(result.remarks)


def test_equal_runs_have_no_difference(write_run):
    result = compare(write_run("a", [0.2, 0.7]), write_run("b", [0.2, 0.7]))
    difference = result.table[-1].difference
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert "The settings are the same." in result.remarks


def test_samples_are_paired_by_id(write_run, record_like):
    first = write_run("a", [0.2, 0.8])
    second = write_run("b", [], [record_like(0.8, sample_id="s1"), record_like(0.3, sample_id="s0")])
    result = compare(first, second)
    assert {pair.first["sample_id"]: round(pair.difference, 6) for pair in result.pairs} == {
        "s0": 0.1,
        "s1": 0.0,
    }


def test_samples_of_only_one_run_are_counted(write_run):
    result = compare(write_run("a", [0.2, 0.8, 0.4]), write_run("b", [0.2, 0.8]))
    assert len(result.pairs) == 2
    assert result.unpaired == (1, 0)
    assert "1 samples of a are not in the other run" in " ".join(result.remarks)


def test_absent_concepts_have_a_separate_row(write_run, record_like):
    def records(iou):
        return [
            record_like(0.5, sample_id="s0"),
            record_like(0.0, sample_id="s1", present=False, foreground_iou=iou),
        ]

    result = compare(write_run("a", [], records(0.0)), write_run("b", [], records(1.0)))
    assert [(row.group, row.difference.mean) for row in result.table[-2:]] == [("all", 0), ("absent", 1)]


def test_mean_of_groups_has_equal_weights(write_run, record_like):
    def records(saliency):
        first_group = [record_like(1.0, sample_id=f"s{index}") for index in range(9)]
        return [*first_group, record_like(saliency, sample_id="t", level="CD", group="saliency")]

    result = compare(write_run("a", [], records(0.0)), write_run("b", [], records(1.0)))
    name, interval = result.mean_of_groups
    assert name == "diverse classes, saliency"
    background = 300 / 400  # background IoU of the missed sample
    assert interval.mean == pytest.approx((0 + 100 * (1 - (0 + background) / 2)) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "paper"}, "protocols standard and paper"),
        ({"benchmark": "other"}, "is of mine/test, but .* is of other/test"),
        ({"split": "val"}, "mine/val"),
    ],
)
def test_different_data_or_protocols_raise(write_run, changes, message):
    first, second = write_run("a", [0.2]), write_run("b", [0.2], **changes)
    with pytest.raises(ValueError, match=message):
        compare(first, second)


def test_different_ground_truths_raise(write_run, record_like):
    other = record_like(0.5, sample_id="s0")
    other["scores"] = other["scores"] | {"fn": 7.0}
    with pytest.raises(ValueError, match="ground truth of sample 's0'"):
        compare(write_run("a", [0.5]), write_run("b", [], [other]))


def test_runs_without_common_samples_and_missing_runs_raise(write_run, record_like, tmp_path):
    with pytest.raises(ValueError, match="no sample with a mask in common"):
        compare(write_run("a", [0.5]), write_run("b", [], [record_like(0.5, sample_id="else")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no records"):
        compare(tmp_path / "a", tmp_path / "empty")


def test_compares_folders_of_several_benchmarks(write_run, tmp_path):
    for run, iou in (("a", 0.2), ("b", 0.6)):
        write_run(f"{run}/one-test", [iou], benchmark="one")
        write_run(f"{run}/two-val", [iou, iou], benchmark="two", split="val")
    result = compare(tmp_path / "a", tmp_path / "b")
    assert [pair.source for pair in result.pairs] == [("one", "test"), ("two", "val"), ("two", "val")]
    assert result.table[-1].wins == 3
    assert result.settings[0]["benchmark"] == "one+two"


def test_compares_evaluations_and_writes_a_gallery(model, processor, tmp_path):
    samples = load_benchmark("concept-shapes")
    for name, router in (("a", "sam_only"), ("b", "full_reasoning")):
        options = {"limit": 6, "router": router, "generation_config": {"max_new_tokens": 4}}
        evaluate(model, samples, processor=processor, output_dir=tmp_path / name, **options)
    result = compare(tmp_path / "a", tmp_path / "b")
    opened = []

    def open_samples(name, split):
        opened.append((name, split))
        return samples

    (tmp_path / "c").mkdir()
    result.write(tmp_path / "c", open_samples)
    assert opened == [("concept-shapes", "test")]
    content = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [run["provenance"]["router"] for run in content["runs"]] == ["sam_only", "full_reasoning"]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "c" / "comparison.csv").read_text())))
    assert [line["sample_id"] for line in lines] == [f"test-{index:06d}" for index in range(6)]
    for line, pair in zip(lines, result.pairs, strict=True):
        assert float(line["b"]) - float(line["a"]) == pytest.approx(pair.difference)
    changed = sum(abs(pair.difference) > 0.01 for pair in result.pairs)
    assert (tmp_path / "c" / "gallery.html").read_text().count("<article>") == changed
    assert (tmp_path / "c" / "comparison.md").read_text() == result.to_markdown() + "\n"
