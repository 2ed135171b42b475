"""The registry against the paper's Tables 5 and 6."""

from __future__ import annotations

import pytest

from conceptseg_hf.data import BENCHMARKS, SOURCES, SUITE, load_benchmark
from conceptseg_hf.data.layouts import LAYOUTS

TABLE_1_GROUPS = {
    "diverse classes", "optical property", "camouflage", "saliency", "industrial anomaly", "medical lesion",
    "consistency", "difference", "rationality", "spatio-temporality",
}  # fmt: skip


def rows(training: bool) -> list[tuple[str, str]]:
    return [(n, s) for n in SUITE for s in SOURCES[n].paper_splits if (s == "train") == training]


def total(pairs: list[tuple[str, str]]) -> int:
    return sum(SOURCES[name].counts[split] for name, split in pairs)


def test_evaluation_sets_match_the_paper():
    evaluation = rows(training=False)
    assert len(evaluation) == 23
    extra = [(name, split) for name, split in evaluation if name in ("cityscapes", "reasonseg")]
    assert total(extra) == 500 + 200 + 779
    assert total(evaluation) - total(extra) == 29_696


def test_training_sets_match_the_paper():
    training = rows(training=True)
    # Table 5 counts MGrounding twice, once for each group.
    assert {name for name, _ in training} == {
        "DUTS", "COD10K1024", "fewshot1000", "CoSOD3k1024", "MGrounding",
    }  # fmt: skip
    assert total(training) == 42_860


def test_groups_match_table_1():
    evaluated = {SOURCES[name].group for name, _ in rows(training=False)}
    assert evaluated == TABLE_1_GROUPS | {"urban scenes", "reasoning"}


def test_every_source_has_a_layout_and_every_layout_a_source():
    assert {source.layout for source in SOURCES.values()} == set(LAYOUTS)
    assert set(BENCHMARKS) == {"concept-shapes", "concept-photos", *SOURCES}
    assert all(SOURCES[name].published.startswith("https://") for name in SUITE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "coco"}, "no benchmark is named 'coco'"),
        ({"name": "DUTS"}, "'DUTS' reads files; give root="),
        ({"name": "DUTS", "root": "nowhere"}, "'nowhere' is not a folder"),
        ({"name": "DUTS", "root": ".", "split": "val"}, "no split 'val'; use one of train, test"),
        ({"name": "DUTS", "root": ".", "limit": 0}, "limit is 0"),
        ({"name": "concept-shapes", "root": "."}, "reads no files; leave root out"),
    ],
)
def test_invalid_arguments_raise_errors_with_a_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_benchmark(**arguments)
