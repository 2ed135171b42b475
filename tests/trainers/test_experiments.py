"""Tests of what experiments have in common: settings, measures, tables and files."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.experiments.command import train_settings
from conceptseg_trainers.experiments.measuring import MEASURES, values_of
from conceptseg_trainers.experiments.reinforcement import random_reward
from conceptseg_trainers.experiments.run_folder import check_settings, complete_folder
from conceptseg_trainers.experiments.settings import TrainSettings
from conceptseg_trainers.experiments.tables import comparison_table, families_table, mean_over_seeds, paired

from conceptseg_hf import format_completion, nano_checkpoint


def test_random_rewards_ignore_completions_and_repeat_with_the_seed() -> None:
    first, again, other = (random_reward(seed) for seed in (0, 0, 1))
    values = first(["a"] * 500)
    assert values == again(["b"] * 500) != other(["a"] * 500)
    assert abs(np.mean(values) - 0.5) < 0.05 and first.__name__ == "random"


def test_values_of_records() -> None:
    record = {"foreground_iou": 0.5, "box_iou": 0.25, "check_iou": None, "chosen": "sibling"}
    texts = [format_completion("t", rule, None, (1, 2, 3, 4), "star", 100) for rule in ("r", None)]
    records = [{**record, "completion": text} for text in texts] + [
        {**record, "chosen": None, "completion": None}
    ]
    values = values_of(records)
    assert set(values) == set(MEASURES)
    assert values["format"] == [1, 0, 0] and values["chosen"] == [0, 0, None]
    assert values_of(records, meta_reasoning=False)["format"] == [0, 1, 0]


def test_shortcut_has_no_format() -> None:
    record = {"foreground_iou": 0.5, "box_iou": None, "check_iou": None, "completion": None}
    assert values_of([{**record, "route": "shortcut"}, {**record, "route": "reasoning"}])["format"] == [
        None,
        0,
    ]


def test_format_requires_a_check_only_with_a_proxy_query() -> None:
    record = {"foreground_iou": 0.5, "box_iou": 0.25}
    texts = [format_completion("t", "r", check, (1, 2, 3, 4), "star", 100) for check in (None, (1, 2, 3, 4))]
    records = [{**record, "check_iou": iou, "completion": text} for iou in (None, 0.0) for text in texts]
    assert values_of(records)["format"] == [1, 0, 0, 1]
    assert values_of(records)["check_iou"] == [None, None, 0, 0]
    assert values_of(records, meta_reasoning=False)["check_iou"] == [None] * 4


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(200).tolist()
    better = [value + 0.1 for value in base]
    gain = paired(better, base, "x")
    # All differences are equal.
    assert gain.mean == pytest.approx(0.1) and gain.low == pytest.approx(0.1) == gain.high
    assert paired([None, 1.0], [0.5, 0.5], "x").samples == 1
    assert mean_over_seeds([[0.0, 1.0], [1.0, None]]) == [0.5, None]


def test_table_has_a_row_per_arm() -> None:
    def values(level: float) -> dict:
        return {"set, greedy": {name: [level, level + 0.2] for name in MEASURES}}

    table = comparison_table(
        {"start": [values(0.1)], "meta": [values(0.3), values(0.5)]},
        "start",
        {"start": "start", "meta": "Meta-GRPO"},
        "set, greedy",
    ).splitlines()
    assert len(table) == 4 and table[0].endswith("| mask IoU - start | box IoU - start |")
    assert table[2].startswith("| start | 1 | 0.200 |") and table[2].endswith("| - | - |")
    assert "| Meta-GRPO | 2 | 0.500 |" in table[3] and "+0.300 [+0.300, +0.300]" in table[3]


def test_table_of_families_compares_the_samples_of_each_family() -> None:
    def values(*levels: float) -> dict:
        return {"set, greedy": {"mask_iou": list(levels)}}

    results = {"start": [values(0.1, 0.2, 0.3)], "meta": [values(0.1, 0.6, 0.3), values(0.3, 0.6, 0.5)]}
    table = families_table(
        results, "start", {"start": "start", "meta": "Meta"}, "set, greedy", ["b", "a", "b"], left_out="b"
    ).splitlines()
    assert table[0] == "| family | n | start | Meta |"
    assert table[2] == "| a | 1 | 0.200 | 0.600, +0.400 [+0.400, +0.400] |"
    assert table[3].startswith("| b | 2 | 0.200 | 0.300, +0.100 [")
    assert table[4] == "| all without b | 1 | 0.200 | 0.600, +0.400 [+0.400, +0.400] |"


def test_results_of_other_settings_are_rejected(tmp_path) -> None:
    start, settings = nano_checkpoint(), TrainSettings(steps=2)
    check_settings(tmp_path / "full", settings, start, 8)
    check_settings(tmp_path / "full", settings, start, 8)
    with pytest.raises(ValueError, match="results with steps = 2, but steps is 3; use another --output-dir"):
        check_settings(tmp_path / "full", replace(settings, steps=3), start, 8)
    with pytest.raises(FileNotFoundError, match="has no weights; give the folder of a checkpoint"):
        check_settings(tmp_path / "new", settings, tmp_path / "missing", 8)
    assert not (tmp_path / "new").exists()


def test_steps_of_the_command_line_replace_those_of_the_experiment() -> None:
    assert TrainSettings(steps=2, prompts=3, num_generations=4).completions == 24
    for steps, expected in ((None, 24), (7, 7)):
        settings = train_settings(Namespace(steps=steps), steps=24, learning_rate=2e-4)
        assert settings == TrainSettings(steps=expected, learning_rate=2e-4)
    assert train_settings(Namespace(steps=None)) == TrainSettings()


def test_a_folder_is_complete_or_missing(tmp_path) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(RuntimeError), complete_folder(folder) as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        raise RuntimeError
    assert not folder.exists()
    with complete_folder(folder) as temporary:
        temporary.mkdir()
        (temporary / "whole").touch()
    assert [path.name for path in folder.iterdir()] == ["whole"]
