"""Tests of the experiments with nano: training data, tables, and a complete run of small arms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("trl", "1.16")

from conceptseg_trainers.experiments.measuring import MEASURES
from conceptseg_trainers.experiments.run_folder import check_settings
from conceptseg_trainers.experiments.settings import TrainSettings
from conceptseg_trainers.nano.evidence import training
from conceptseg_trainers.nano.evidence.__main__ import MAIN_SOURCE, main, read_logs, run, write_report
from conceptseg_trainers.nano.evidence.arms import ARMS
from conceptseg_trainers.nano.evidence.tables import pairs_table, runs_table
from conceptseg_trainers.nano.evidence.training import evaluation_samples, train_arm, training_samples
from conceptseg_trainers.nano.vlm_data import RANDOM_CHOICE_FAMILIES

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, nano_checkpoint

# The learning rate of the first step is 0.
SMALL = TrainSettings(
    steps=2, prompts=2, num_generations=4, num_best_and_worst=1, batch_size=4, learning_rate=1e-4
)


def test_arms_have_the_settings_that_their_titles_state() -> None:
    assert ARMS["meta"].rewards == ("format", "mask", "meta")
    assert ARMS["box"].prompted_by == "box" and ARMS["box"].seg_loss_weight == 0
    assert not ARMS["no-meta-reasoning"].meta_reasoning and "meta" not in ARMS["no-meta-reasoning"].rewards
    assert ARMS["random"].random_rewards and ARMS["sft"].supervised and not ARMS["sft"].rewards


def test_samples_are_of_random_choice_families_and_disjoint() -> None:
    count = len(RANDOM_CHOICE_FAMILIES)
    train = [training_samples(2 * count, seed) for seed in (0, 1)]
    for samples in train:  # each family in turn
        assert sorted(s.family for s in samples[:count]) == sorted(RANDOM_CHOICE_FAMILIES)
        assert [s.family for s in samples[:count]] == [s.family for s in samples[count:]]
    held_out = evaluation_samples(8)
    assert set(held_out) == {"trained families", "held-out rules", "compositional looks"}
    # Both variants of a target of "coexistence" have the same image, so the images of each set are compared as a set.
    images = [
        {np.asarray(sample.image).tobytes() for sample in samples} for samples in (*train, *held_out.values())
    ]
    assert len(set.union(*images)) == sum(map(len, images)) > 4 * count + 20
    assert {sample.split for sample in held_out["held-out rules"]} == {"test-rules"}
    assert {sample.split for sample in held_out["compositional looks"]} == {"test-compositional"}
    assert len({sample.family for sample in held_out["trained families"]}) > 4


def test_evaluation_sets_have_the_default_number_of_samples() -> None:
    """The groups of Table 1 contain fewer samples of these families than the other groups."""
    samples = evaluation_samples(300)
    assert all(len(set_samples) == 300 for set_samples in samples.values())
    assert len({sample.sample_id for sample in samples["trained families"]}) == 300
    assert all(sample.present for set_samples in samples.values() for sample in set_samples)


def test_arms_are_compared_with_each_other() -> None:
    def values(*levels: float) -> dict:
        return {"set, greedy": {name: list(levels) for name in MEASURES}}

    titles = {"meta": "Meta", "ctm": "CTM", "random": "Random"}
    results = {"meta": [values(0.5, 0.7), values(0.7, 0.9)], "ctm": [values(0.2, 0.4)]}
    table = pairs_table(results, [("meta", "ctm"), ("meta", "random")], titles, "set, greedy").splitlines()
    assert len(table) == 3 and table[2] == "| Meta - CTM |" + " +0.400 [+0.400, +0.400] |" * len(MEASURES)


def test_table_of_runs_has_cpu_time_and_entropy_of_each_seed() -> None:
    def values(level: float) -> dict:
        return {"set, greedy": {name: [level, level] for name in MEASURES}}

    results = {"start": [values(0.1)], "meta": [values(0.3)], "sft": [values(0.6)]}
    steps = [{"entropy": 1.0}, {"entropy": 0.5}, {"train_runtime": 1}]
    logs = {
        "meta": [{"seed": 2, "cpu_seconds": 90.0, "steps": steps}],
        "sft": [{"seed": 2, "cpu_seconds": 60.0, "steps": []}],
    }
    table = runs_table(results, logs, "start", {"start": "start", "meta": "M", "sft": "S"}, "set, greedy")
    assert table.splitlines()[2:] == [
        "| M | 2 | +0.200 [+0.200, +0.200] | 1.5 | 1.00, 0.50 |",
        "| S | 2 | +0.500 [+0.500, +0.500] | 1.0 | - |",
    ]


def test_unsuitable_folders_are_rejected(tmp_path, capsys) -> None:
    start = nano_checkpoint()
    check_settings(tmp_path / "full", SMALL, start, 8)
    with pytest.raises(SystemExit):
        main(["--start", str(start), "--output-dir", str(tmp_path), "--samples", "8"])
    assert "contains results with steps = 2, but steps is 60" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--start", str(tmp_path)])
    assert "is not a checkpoint" in capsys.readouterr().err


def test_one_stage_starts_with_a_new_ctm(tmp_path, monkeypatch) -> None:
    """The seed determines the new weights; the VLM and SAM 3 are those of the start."""
    monkeypatch.setattr(training, "train_by_reinforcement", lambda *arguments: [])
    start = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    states = []
    for name in ("meta", "one-stage"):
        checkpoint = train_arm(ARMS[name], nano_checkpoint(), tmp_path / name, SMALL, seed=0)
        states.append(ConceptSegForSegmentation.from_pretrained(checkpoint).state_dict())
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, states[0][name])
        if not name.startswith("ctm."):
            assert torch.equal(weight, states[1][name])
        elif weight.ndim > 1:
            assert not torch.equal(weight, states[1][name])
    assert states[1]["ctm.queries"].std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.slow
def test_arms_are_trained_measured_and_compared(tmp_path) -> None:
    start = nano_checkpoint()
    names = ("meta", "no-meta-reasoning", "random", "sft")
    arms = {name: ARMS[name] for name in names}
    samples = {name: set_samples[:4] for name, set_samples in evaluation_samples(6).items()}
    results = run(arms, [0], start, tmp_path, SMALL, samples)
    for name in names:
        folder = tmp_path / name / "seed_0"
        values = json.loads((folder / "values.json").read_text())
        assert values == results[name][0] and all(len(column) == 4 for column in values[MAIN_SOURCE].values())
        trained = ConceptSegForSegmentation.from_pretrained(folder / "checkpoint").state_dict()
        original = ConceptSegForSegmentation.from_pretrained(start).state_dict()
        changed = {key for key in original if not torch.equal(original[key], trained[key])}
        parts = {key.split(".")[0] for key in changed}
        assert parts == ({"vlm"} if name == "sft" else {"vlm", "ctm"})
        assert not any("visual" in key for key in changed)
    short = ConceptSegProcessor.from_pretrained(tmp_path / "no-meta-reasoning" / "seed_0" / "checkpoint")
    assert short.template.system == "show"
    assert not any(results["no-meta-reasoning"][0][MAIN_SOURCE]["check_iou"])
    again = run(arms, [0], start, tmp_path, SMALL, samples)
    assert again == results
    logs = read_logs(names, [0], tmp_path)
    assert len(logs["meta"][0]["steps"]) == 3 and not logs["sft"][0]["steps"]
    assert all(log["seed"] == 0 and log["cpu_seconds"] > 0 for (log,) in logs.values())
    report = write_report(results, logs, tmp_path / "evidence.md", SMALL, start, samples)
    assert report.count("| Meta-GRPO | 1 |") == 6 and (tmp_path / "evidence.md").read_text() == report
    assert report.count("| Meta-GRPO - random rewards (control) |") == 6
    assert report.count("| SAM 3 only | 1 |") == 6 and report.count("| start, box prompt | 1 |") == 6
    assert not any(results["sam-only"][0][MAIN_SOURCE]["format"])
    assert "| Meta-GRPO | 0 |" in report and "GRPO, CTM" not in report
