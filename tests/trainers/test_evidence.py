"""The experiments on nano: what is trained, what is measured, and how runs are compared."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("trl")
from conceptseg_trainers.nano.evidence.arms import ARMS
from conceptseg_trainers.nano.evidence.measuring import MEASURES, values_of
from conceptseg_trainers.nano.evidence.tables import comparison_table, mean_over_seeds, paired
from conceptseg_trainers.nano.evidence.training import (
    TrainSettings,
    evaluation_samples,
    random_reward,
    training_samples,
)
from conceptseg_trainers.nano.vlm_stage import UNTAUGHT_FAMILIES

from conceptseg_hf import format_completion


def test_arms_differ_in_what_they_are_about() -> None:
    assert ARMS["meta"].rewards == ("format", "mask", "meta")
    assert ARMS["box"].prompted_by == "box" and ARMS["box"].seg_loss_weight == 0
    assert not ARMS["no-meta-reasoning"].meta_reasoning and "meta" not in ARMS["no-meta-reasoning"].rewards
    assert ARMS["random"].random_rewards and ARMS["sft"].supervised and not ARMS["sft"].rewards
    assert TrainSettings(steps=2, prompts=3, num_generations=4).completions == 24


def test_samples_are_of_untaught_families_and_disjoint() -> None:
    train = [training_samples(12, seed) for seed in (0, 1)]
    assert all(sample.family in UNTAUGHT_FAMILIES for samples in train for sample in samples)
    held_out = evaluation_samples(8)
    assert set(held_out) == {"trained families", "held-out rules", "compositional looks"}
    images = [
        np.asarray(sample.image).tobytes() for samples in (*train, *held_out.values()) for sample in samples
    ]
    assert len(set(images)) == len(images) == 48
    assert {sample.split for sample in held_out["held-out rules"]} == {"test-rules"}
    assert {sample.split for sample in held_out["compositional looks"]} == {"test-compositional"}
    assert len({sample.family for sample in held_out["trained families"]}) > 4


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


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(200).tolist()
    better = [value + 0.1 for value in base]
    gain = paired(better, base, "x")
    assert gain.mean == pytest.approx(0.1) and gain.low == pytest.approx(0.1) == gain.high  # no noise is left
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
    assert len(table) == 4
    assert table[2].startswith("| start | 1 | 0.200 |") and table[2].endswith("| - | - |")
    assert "| Meta-GRPO | 2 | 0.500 |" in table[3] and "+0.300 [+0.300, +0.300]" in table[3]
