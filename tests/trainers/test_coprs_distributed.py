"""CoPRSTrainer with two processes (torchrun, gloo): DDP, ZeRO-2 and ZeRO-3 match one process and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from conceptseg_hf import CoPRSForSegmentation

pytest.importorskip("trl", "1.16")
import two_processes
from distributed_runs import check_resumed, compare

LOGGED = (
    *("loss", "kl", "loss/grpo", "loss/seg", "loss/prior", "loss/dice", "loss/focal"),
    *("mask_iou", "reward", "rewards/mask/mean", "rewards/format/mean"),
)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Folder of the same run in one process, which accumulates the gradients of two batches."""
    folder = tmp_path_factory.mktemp("one")
    two_processes.write(two_processes.train("none", folder, "coprs", gradient_accumulation_steps=2), folder)
    return folder


@pytest.fixture(scope="module")
def ddp(run_two, tmp_path_factory) -> Path:
    """Folder of the run with DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    run_two("ddp", folder, "coprs")
    return folder


@pytest.mark.slow
def test_two_processes_match_one_process(one_process, ddp) -> None:
    # TRL averages the KL over the tokens of a batch and then over batches, so that it depends on the batches.
    names = [name for name in LOGGED if name != "kl"]
    figures = compare(ddp, one_process, names, CoPRSForSegmentation)
    assert figures["world_size"] == 2 and figures["kind"] == "MULTI_CPU"
    for entry in figures["log"]:
        assert entry["loss/dice"] > 0.1 and 0 < entry["rewards/format/mean"] < 1
    check_resumed(figures, LOGGED)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_matches_ddp(run_two, ddp, tmp_path, stage) -> None:
    pytest.importorskip("deepspeed")
    run_two(f"zero{stage}", tmp_path, "coprs")
    figures = compare(tmp_path, ddp, LOGGED, CoPRSForSegmentation)
    assert figures["world_size"] == 2 and figures["zero_stage"] == stage
    assert figures["sharded"] == [stage == 3] and figures["frozen_sharded"] == [False]
    check_resumed(figures, LOGGED)
