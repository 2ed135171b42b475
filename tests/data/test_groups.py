"""Groups of benchmarks, on a tree in the authors' layout."""

from __future__ import annotations

import json

import pytest

from conceptseg_hf.data import (
    GROUPS,
    SOURCES,
    BenchmarkGroup,
    MissingFilesError,
    load_benchmark,
    load_benchmarks,
)
from conceptseg_hf.evaluation import evaluate


@pytest.fixture()
def tree(authors_tree):
    """All 20 datasets of Table 1, with two samples each."""
    tree = authors_tree
    for name, _ in GROUPS["table1"]:
        for number in range(2):
            tree.add("train", name, name, f"train_{number}")
            tree.add("test", name, name, f"test_{number}", problem="find it")
    tree.write()
    return tree


def test_rows_match_the_paper():
    assert [len(GROUPS[name]) for name in ("all", "table1", "ci", "cd", "cr")] == [23, 20, 5, 8, 10]
    assert len({SOURCES[name].group for name, _ in GROUPS["table1"]}) == 10
    others = set(GROUPS["all"]) - set(GROUPS["table1"])
    assert others == {("cityscapes", "val"), ("reasonseg", "val"), ("reasonseg", "test")}
    assert sorted(GROUPS["all"]) == sorted([*GROUPS["ci"], *GROUPS["cd"], *GROUPS["cr"]])
    total = sum(SOURCES[name].counts[split] for name, split in GROUPS["table1"])
    assert total == sum(
        (1700, 6244, 5325, 52, 4428, 638, 2026, 5017, 717, 798, 161, 808, 477, 84, 93, 187, 85, 89, 224, 543)
    )


def test_names_load_benchmarks_and_lists_load_groups(tree):
    assert len(load_benchmarks("concept-shapes", limit=3)) == 3
    assert load_benchmarks("Polyp", root=tree.root).name == "Polyp"
    group = load_benchmarks("Polyp, cd,concept-shapes", root=tree.root, limit=1)
    assert isinstance(group, BenchmarkGroup)
    names = [f"{name}-{split}" for name, split in GROUPS["cd"]]
    names.remove("Polyp-test")
    assert list(group.members) == ["Polyp-test", *names, "concept-shapes-test"]
    assert {len(samples) for samples in group.members.values()} == {1}
    assert list(load_benchmarks("CD", root={"*": tree.root}).members) == list(
        load_benchmarks("cd", root=tree.root).members
    )


def test_root_of_each_benchmark(tree, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' is not a folder; give the folder of 'Polyp'"):
        load_benchmarks("Polyp,DUTS", root={"*": tree.root, "Polyp": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="no benchmark is named 'other'"):
        load_benchmarks("Polyp,DUTS", root={"*": tree.root, "other": tree.root})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("other", {}, "no benchmark is named 'other'"),
        ("cd,other", {}, "no benchmark is named 'other'"),
        ("cd", {"split": "train"}, "the group 'cd' uses the paper's splits"),
        ("cd", {}, "8 of 8 benchmarks cannot be read"),
        ("all", {"root": "nowhere"}, "and 20 more: root 'nowhere' is not a folder"),
    ],
)
def test_invalid_names_and_roots(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_benchmarks(name, **options)


def test_missing_files_of_all_benchmarks_are_reported_before_the_evaluation(model, processor, tree, tmp_path):
    gone = ["Polyp/test/image/test_1.jpg", "DUTS/test/mask/test_0.png", "DUTS/train/image/train_0.jpg"]
    for path in gone:
        (tree.root / path).unlink()
    with pytest.raises(MissingFilesError) as caught:
        evaluate(model, "CD", processor=processor, root=tree.root, output_dir=tmp_path / "out")
    assert {path for _, path in caught.value.missing} == {tree.root / path for path in gone}
    assert "2 of 8 benchmarks" in str(caught.value) and "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in ("Polyp: lacks 1 of", "DUTS: lacks 2 of"))
    assert not (tmp_path / "out").exists()


def test_a_group_is_evaluated_in_folders_and_reported_as_one(model, processor, tree, tmp_path, monkeypatch):
    options = {
        "processor": processor,
        "root": tree.root,
        "router": "sam_only",
        "output_dir": tmp_path / "out",
    }
    report = evaluate(model, "Cd", **options)
    assert len(report.records) == 16 and not report.failed
    assert report.settings["benchmark"] == "Cd" and report.settings["split"] == "test"
    assert [(row["benchmark"], row["samples"]) for row in report.settings["benchmarks"]] == [
        (name, 2) for name, _ in GROUPS["cd"]
    ]
    assert [record["dataset"] for record in report.records[::2]] == [name for name, _ in GROUPS["cd"]]
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders >= {f"{name}-test" for name, _ in GROUPS["cd"]}
    assert (tmp_path / "out" / "report.md").is_file()

    alone = evaluate(model, load_benchmark("Polyp", tree.root), processor=processor, router="sam_only")
    lines = (tmp_path / "out" / "Polyp-test" / "records.jsonl").read_text().splitlines()
    assert [record["foreground_iou"] for record in map(json.loads, lines)] == [
        record["foreground_iou"] for record in alone.records
    ]

    def never(*_, **__):
        raise AssertionError("all results are complete")

    monkeypatch.setattr("conceptseg_hf.evaluation.running.evaluator.segment_samples", never)
    again = evaluate(model, "cd", **options)
    assert again.records == report.records and again.table == report.table
