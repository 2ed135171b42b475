"""Tests with two processes (torchrun, gloo): DDP, ZeRO-2 and ZeRO-3 match one process; FSDP2 can generate."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from conceptseg_hf import ConceptSegForSegmentation, CoPRSForSegmentation

pytest.importorskip("trl", "1.16")
import two_processes
from conceptseg_trainers.distributed import clone_unsharded, make_generate_gather, materialize
from distributed_runs import check_resumed, compare

LOGGED = {
    "conceptseg": (
        *("loss", "kl", "loss/grpo", "loss/seg", "loss/dice", "loss/focal"),
        *("mask_iou", "box_iou", "reward"),
    ),
    "coprs": (
        *("loss", "kl", "loss/grpo", "loss/seg", "loss/prior", "loss/dice", "loss/focal"),
        *("mask_iou", "reward", "rewards/mask/mean", "rewards/format/mean"),
    ),
}
MODELS = {"conceptseg": ConceptSegForSegmentation, "coprs": CoPRSForSegmentation}
both_systems = pytest.mark.parametrize("system", LOGGED)


@pytest.fixture(scope="module")
def runs(run_two, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that trains both systems and returns the folder with a subfolder for each; cached.

    "one" is the same run in one process, which accumulates the gradients of two batches.
    """

    @functools.cache
    def folder_of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        if kind == "one":
            for system in LOGGED:
                figures = two_processes.train("none", folder / system, system, gradient_accumulation_steps=2)
                two_processes.write(figures, folder / system)
        else:
            run_two(kind, folder)
        return folder

    return folder_of


@pytest.mark.slow
@pytest.mark.heavy
@both_systems
def test_two_processes_match_one_process(runs, system) -> None:
    # TRL averages the KL over the tokens of a batch and then over batches, so that it depends on the batches.
    names = [name for name in LOGGED[system] if name != "kl"]
    figures = compare(runs("ddp") / system, runs("one") / system, names, MODELS[system])
    assert figures["world_size"] == 2 and figures["kind"] == "MULTI_CPU"
    if system == "conceptseg":
        # Rewards differ within some group.
        assert [entry["frac_reward_zero_std"] for entry in figures["log"]] != [1.0] * 3
        assert figures["log"][0]["kl"] == 0.0 and figures["log"][2]["kl"] > 0
    else:
        for entry in figures["log"]:
            assert entry["loss/dice"] > 0.1 and 0 < entry["rewards/format/mean"] < 1
    check_resumed(figures, LOGGED[system])


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("stage", [2, 3])
@both_systems
def test_zero_matches_ddp(runs, stage, system) -> None:
    pytest.importorskip("deepspeed")
    figures = compare(runs(f"zero{stage}") / system, runs("ddp") / system, LOGGED[system], MODELS[system])
    assert figures["world_size"] == 2 and figures["zero_stage"] == stage
    assert figures["sharded"] == [stage == 3] and figures["frozen_sharded"] == [False]
    check_resumed(figures, LOGGED[system])


@pytest.mark.slow
def test_fsdp2_generates_with_sharded_weights(run_two, tmp_path) -> None:
    run_two("fsdp2", tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == {"world_size": 2, "same": True, "fails_without": True}


def test_helpers_without_sharding(make_model, weight_hash) -> None:
    model = make_model()
    parameters = list(model.sam.parameters())
    assert list(map(id, materialize(model.sam).parameters())) == list(map(id, parameters))
    clone = clone_unsharded(model.vlm)
    assert weight_hash(clone) == weight_hash(model.vlm)
    assert not clone.training and not any(parameter.requires_grad for parameter in clone.parameters())
    assert {id(p) for p in clone.parameters()}.isdisjoint(id(p) for p in model.vlm.parameters())
    make_generate_gather(nn.Linear(1, 1))
