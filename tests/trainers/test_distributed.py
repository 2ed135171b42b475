"""Two processes (torchrun, gloo): DDP, ZeRO-2 and ZeRO-3 train what one process trains; FSDP2 generates."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import nn

from conceptseg_hf import ConceptSegForSegmentation

pytest.importorskip("trl", "1.16")
from conceptseg_trainers.distributed import clone_unsharded, make_generate_gather, materialize

WORKER = Path(__file__).with_name("two_processes.py")
LOGGED = ("loss", "kl", "loss/grpo", "loss/seg", "loss/dice", "loss/focal", "mask_iou", "box_iou", "reward")


@pytest.fixture(scope="module")
def run_two(run_two_processes) -> Callable[[str, Path], dict]:
    """Runs the worker, and reads its figures."""

    def run(kind: str, folder: Path) -> dict:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        result = run_two_processes(str(WORKER), kind, str(folder), env=environment)
        assert result.returncode == 0, result.stderr[-20000:]
        return json.loads((folder / "figures.json").read_text())

    return run


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The folder of the same run in one process, which accumulates the gradients of two batches."""
    sys.path.insert(0, str(WORKER.parent))
    try:
        import two_processes
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("one")
    two_processes.write(two_processes.train("none", folder, gradient_accumulation_steps=2), folder)
    return folder


@pytest.fixture(scope="module")
def ddp(run_two, tmp_path_factory) -> Path:
    """The folder of the run with DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    run_two("ddp", folder)
    return folder


def compare(folder: Path, other: Path, names: Sequence[str]) -> dict:
    """Asserts that two runs had the same losses to 1e-5, and ended with the same weights; returns the figures."""
    ours, theirs = (json.loads((path / "figures.json").read_text()) for path in (folder, other))
    assert len(ours["log"]) == len(theirs["log"]) == 3
    for our_entry, their_entry in zip(ours["log"], theirs["log"], strict=True):
        for name in names:
            assert our_entry[name] == pytest.approx(their_entry[name], abs=1e-5), (name, our_entry["step"])
    ours["weights"], theirs["weights"] = (
        ConceptSegForSegmentation.from_pretrained(path / "whole").state_dict() for path in (folder, other)
    )
    differences = [
        (weight - theirs["weights"][name]).abs().max().item() for name, weight in ours["weights"].items()
    ]
    assert max(differences) < 2e-5
    return ours


@pytest.mark.slow
def test_two_processes_train_what_one_does(one_process, ddp) -> None:
    # TRL averages the KL over tokens within a batch, and batches alike: with two batches it is another mean.
    figures = compare(ddp, one_process, [name for name in LOGGED if name != "kl"])
    assert figures["world_size"] == 2 and figures["kind"] == "MULTI_CPU"
    assert [entry["frac_reward_zero_std"] for entry in figures["log"]] != [
        1.0
    ] * 3  # the policy had something to learn
    assert figures["log"][0]["kl"] == 0.0 and figures["log"][2]["kl"] > 0
    check_resumed(figures)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_what_ddp_does(run_two, ddp, tmp_path, stage) -> None:
    pytest.importorskip("deepspeed")
    run_two(f"zero{stage}", tmp_path)
    figures = compare(tmp_path, ddp, LOGGED)
    assert figures["world_size"] == 2 and figures["zero_stage"] == stage
    assert figures["sharded"] == [stage == 3] and figures["sam_sharded"] == [False]
    check_resumed(figures)


def check_resumed(figures: dict) -> None:
    """Step 3 after a resume from the checkpoint of step 2 is step 3 of the run, and SAM 3 as it was."""
    for name in LOGGED:
        assert figures["resumed"][name] == pytest.approx(figures["log"][2][name], abs=1e-7), name
    assert figures["resumed_weights"] == figures["final_weights"]
    assert figures["sam_unchanged"]


@pytest.mark.slow
def test_fsdp2_generates_with_sharded_weights(run_two, tmp_path) -> None:
    figures = run_two("fsdp2", tmp_path)
    assert figures == {"world_size": 2, "same": True, "fails_without": True}


def test_without_sharding_nothing_is_copied_twice_or_lost(make_model, weight_hash) -> None:
    model = make_model()
    parameters = list(model.sam.parameters())
    assert list(map(id, materialize(model.sam).parameters())) == list(map(id, parameters))
    clone = clone_unsharded(model.vlm)
    assert weight_hash(clone) == weight_hash(model.vlm)
    assert not clone.training and not any(parameter.requires_grad for parameter in clone.parameters())
    assert {id(p) for p in clone.parameters()}.isdisjoint(id(p) for p in model.vlm.parameters())
    make_generate_gather(nn.Linear(1, 1))
