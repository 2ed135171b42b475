"""Short runs of the experiments with CoPRS: ablations, the effect of GRPO, and the comparison of both interfaces."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conceptseg_hf import ConceptSegForSegmentation, CoPRSForSegmentation, nano_checkpoint

pytest.importorskip("trl", "1.16")
from conceptseg_trainers.coprs_nano import ablations, grpo_effect, interfaces
from conceptseg_trainers.coprs_nano.report import write_checkpoint
from conceptseg_trainers.coprs_nano.stage import build_model
from conceptseg_trainers.coprs_nano.tokenizers import build_processor
from conceptseg_trainers.coprs_nano.values import MEASURES, values_of
from conceptseg_trainers.experiments.settings import TrainSettings
from conceptseg_trainers.nano.evidence.training import evaluation_samples
from random_coprs import save_random_coprs


def test_values_of_records() -> None:
    prior = {"iou": 0.25, "auroc": 0.75, "average_precision": 0.5, "share": None}
    record = {"foreground_iou": 0.5, "prior": prior, "chosen": "sibling", "format_valid": True}
    failed = {"foreground_iou": 0.0, "prior": None, "chosen": None, "format_valid": None}
    values = values_of([record, failed])
    assert tuple(values) == MEASURES
    assert values["prior_iou"] == [0.25, None] and values["share"] == [None, None]
    assert values["chosen"] == [0.0, None] and values["format"] == [1.0, 0.0]


# -- ablations --


@pytest.fixture
def short_stages(monkeypatch):
    """Two steps of a few examples."""
    monkeypatch.setattr(ablations, "scaled", lambda *_: 2)
    monkeypatch.setattr(ablations, "PriorData", functools.partial(ablations.PriorData, count=2))


def ablation_arguments(folder: Path, *variants: str, **changes) -> argparse.Namespace:
    values = {
        "run_dir": folder,
        "variants": list(variants),
        "backbones": [],
        "start": nano_checkpoint(),
        "samples": 2,
        "seed": 0,
        "scale": 0.01,
        "device": "cpu",
    }
    return argparse.Namespace(**{**values, **changes})


def test_variants_are_those_of_the_paper() -> None:
    assert {ablations.VARIANTS[name].config.get("num_heads", 4) for name in ablations.VARIANTS} == {
        1,
        2,
        4,
        8,
    }
    assert ablations.VARIANTS["no-prior-loss"].settings.prior_weight == 0
    assert not ablations.VARIANTS["no-reasoning"].settings.with_reasoning
    assert [name for name, variant in ablations.VARIANTS.items() if variant.backbone != "start"] == [
        "random-backbone"
    ]


@pytest.mark.slow
def test_ablations_train_each_variant_once(short_stages, tmp_path, monkeypatch) -> None:
    ablations.run(ablation_arguments(tmp_path, "heads-2", "random-backbone"))
    table = (tmp_path / "ablations.md").read_text()
    for title in ("coprs-nano: 4 heads", "2 heads", "random vision backbone"):
        assert table.count(f"| {title} | 1 |") == 2  # both sets
    models = {
        name: CoPRSForSegmentation.from_pretrained(tmp_path / name / "checkpoint")
        for name in ("full", "heads-2", "random-backbone")
    }
    assert [model.prior.num_heads for model in models.values()] == [4, 2, 4]
    weights = [
        model.sam.vision_encoder.backbone.state_dict()["layers.0.attention.q_proj.weight"]
        for model in models.values()
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2], atol=1e-3)
    values = json.loads((tmp_path / "heads-2" / "values.json").read_text())
    assert set(values) == {"Table 1, greedy", "which one, greedy"}
    assert [len(numbers) for numbers in values["Table 1, greedy"].values()] == [2] * len(MEASURES)

    # Finished variants are not trained again, and other settings are refused.
    monkeypatch.setattr(ablations, "train", lambda *_: pytest.fail("trained again"))
    ablations.run(ablation_arguments(tmp_path, "heads-2", "random-backbone"))
    assert (tmp_path / "ablations.md").read_text() == table
    with pytest.raises(ValueError, match="contains results with samples = 2, but samples is 3"):
        ablations.run(ablation_arguments(tmp_path, samples=3))


def test_frozen_random_parts_depend_on_the_seed_alone() -> None:
    """They are not in the saved state, so a resumed run must have the same ones."""
    start = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    variant, processor = ablations.VARIANTS["random-backbone"], build_processor()
    states = []
    for seed in (0, 0, 1):
        torch.seed()
        model = build_model(start, processor, seed, ablations.backbone_of(variant, start, seed))
        states.append(model.state_dict())
    first, same, other = states
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    name = "sam.shared_image_embedding.positional_embedding"
    assert not torch.equal(first[name], other[name])
    assert any(
        not torch.equal(value, other[name])
        for name, value in first.items()
        if "vision_encoder.backbone" in name
    )


# -- the effect of GRPO --

SMALL = TrainSettings(
    steps=2, prompts=2, num_generations=4, num_best_and_worst=1, batch_size=4, learning_rate=1e-3
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """A checkpoint of coprs-nano before its training, whose VLM is that of nano."""
    folder = tmp_path_factory.mktemp("start")
    start = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    write_checkpoint(build_model(start, build_processor()), folder)
    return folder


@pytest.mark.slow
def test_effect_of_grpo_is_measured_against_the_start_and_the_control(
    untrained, tmp_path, monkeypatch
) -> None:
    samples = {name: members[:2] for name, members in evaluation_samples(2).items()}
    arms = ["coprs", "seg"]
    results = grpo_effect.run(arms, [0], untrained, tmp_path, SMALL, samples)
    assert list(results) == ["start", "coprs", "seg"] and len(results["start"][0]) == 6
    start = load_file(untrained / "model.safetensors")
    for arm in arms:
        folder = tmp_path / arm / "seed_0"
        log = json.loads((folder / "training.json").read_text())["steps"]
        assert len([entry for entry in log if "loss" in entry]) == SMALL.steps
        assert {name for entry in log for name in entry if name.endswith("/mean") and "rewards/" in name} == (
            {"rewards/random/mean"} if arm == "seg" else {"rewards/mask/mean", "rewards/format/mean"}
        )
        trained = load_file(folder / "checkpoint" / "model.safetensors")
        changed = {
            name.split(".")[0]
            for name, value in trained.items()
            if not torch.equal(value, start[name].float())
        }
        assert "vlm" in changed and not any(
            not torch.equal(value, start[name].float())
            for name, value in trained.items()
            if "vision_encoder" in name
        )
    report = grpo_effect.write_report(results, tmp_path / "report.md", SMALL)
    assert report.count("| GRPO + L_SEG (eq. 4) | 1 |") == 6 == report.count("| start | 1 |")
    assert "- mask_iou: GRPO + L_SEG (eq. 4) - L_SEG, random rewards (control): " in report
    monkeypatch.setattr(grpo_effect, "CoPRSTrainer", lambda *_, **__: pytest.fail("trained again"))
    assert grpo_effect.run(arms, [0], untrained, tmp_path, SMALL, samples) == results


def test_arms_differ_as_stated() -> None:
    arms = grpo_effect.ARMS
    assert [(arm.supervised, arm.random_rewards) for arm in arms.values()] == [
        (True, False),
        (False, False),
        (True, True),
        (False, True),
    ]
    for name, control in grpo_effect._EFFECTS:
        assert arms[name].supervised == arms[control].supervised and arms[control].random_rewards


def test_effect_of_grpo_requires_a_start(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        grpo_effect.main(["--start", str(tmp_path)])
    assert "coprs_nano --stage base" in capsys.readouterr().err


# -- both interfaces --


def test_interfaces_are_compared_on_the_same_samples(make_model, processor, tmp_path, capsys) -> None:
    conceptseg, coprs, output = tmp_path / "conceptseg", tmp_path / "coprs", tmp_path / "out"
    model = make_model()
    model.config.max_new_tokens = 2
    model.save_pretrained(conceptseg)
    processor.save_pretrained(conceptseg)
    save_random_coprs(coprs)
    options = ["--conceptseg", str(conceptseg), "--coprs", str(coprs), "--output-dir", str(output)]
    assert interfaces.main([*options, "--samples", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith((output / "interfaces.md").read_text())

    def ious(system: str, name: str) -> list[float]:
        lines = (output / system / name / "records.jsonl").read_text().splitlines()
        return [json.loads(line)["foreground_iou"] for line in lines]

    first, second = ious("conceptseg", "which-one"), ious("coprs", "which-one")
    assert len(first) == len(second) == 3
    (row,) = (line for line in printed.splitlines() if line.startswith("| CR") and "| which one" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:5] == ["3", f"{np.mean(first):.3f}", f"{np.mean(second):.3f}"]
    assert cells[5].startswith(f"{np.mean(second) - np.mean(first):+.3f} [")
    assert "Fraction of masks that overlap most with the target:" in printed
    assert "| hidden rule" in printed.partition("Positional prior of CoPRS:")[2]
    before = (output / "coprs" / "which-one" / "records.jsonl").read_bytes()
    assert interfaces.main([*options, "--samples", "3"]) == 0
    assert (output / "coprs" / "which-one" / "records.jsonl").read_bytes() == before


def test_interfaces_name_a_missing_checkpoint(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        interfaces.main(["--coprs", str(tmp_path / "none"), "--output-dir", str(tmp_path), "--samples", "1"])
    assert "none" in capsys.readouterr().err
