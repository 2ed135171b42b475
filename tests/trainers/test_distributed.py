"""Tests with two processes (torchrun, gloo): DDP, ZeRO-2 and ZeRO-3 match one process; FSDP2 can generate."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from conceptseg_hf import ConceptSegForSegmentation

pytest.importorskip("trl", "1.16")
import two_processes
from conceptseg_trainers.distributed import clone_unsharded, make_generate_gather, materialize
from distributed_runs import check_resumed, compare

LOGGED = ("loss", "kl", "loss/grpo", "loss/seg", "loss/dice", "loss/focal", "mask_iou", "box_iou", "reward")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Folder of the same run in one process, which accumulates the gradients of two batches."""
    folder = tmp_path_factory.mktemp("one")
    two_processes.write(two_processes.train("none", folder, gradient_accumulation_steps=2), folder)
    return folder


@pytest.fixture(scope="module")
def ddp(run_two, tmp_path_factory) -> Path:
    """Folder of the run with DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    run_two("ddp", folder)
    return folder


@pytest.mark.slow
def test_two_processes_match_one_process(one_process, ddp) -> None:
    # TRL averages the KL over the tokens of a batch and then over batches, so that it depends on the batches.
    figures = compare(ddp, one_process, [name for name in LOGGED if name != "kl"], ConceptSegForSegmentation)
    assert figures["world_size"] == 2 and figures["kind"] == "MULTI_CPU"
    assert [entry["frac_reward_zero_std"] for entry in figures["log"]] != [
        1.0
    ] * 3  # rewards differ within some group
    assert figures["log"][0]["kl"] == 0.0 and figures["log"][2]["kl"] > 0
    check_resumed(figures, LOGGED)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_matches_ddp(run_two, ddp, tmp_path, stage) -> None:
    pytest.importorskip("deepspeed")
    run_two(f"zero{stage}", tmp_path)
    figures = compare(tmp_path, ddp, LOGGED, ConceptSegForSegmentation)
    assert figures["world_size"] == 2 and figures["zero_stage"] == stage
    assert figures["sharded"] == [stage == 3] and figures["frozen_sharded"] == [False]
    check_resumed(figures, LOGGED)


@pytest.mark.slow
def test_fsdp2_generates_with_sharded_weights(run_two, tmp_path) -> None:
    figures = run_two("fsdp2", tmp_path)
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
