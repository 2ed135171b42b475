"""CoPRSTrainer with two processes (torchrun, gloo) matches one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from conceptseg_hf import CoPRSForSegmentation

pytest.importorskip("trl", "1.16")

WORKER = Path(__file__).with_name("coprs_processes.py")
LOGGED = ("loss", "loss/grpo", "loss/seg", "loss/prior", "loss/dice", "mask_iou", "reward", "grad_norm")


@pytest.mark.slow
def test_two_processes_match_one_process(run_two_processes, tmp_path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = run_two_processes(str(WORKER), str(two), env=environment)
    assert result.returncode == 0, result.stderr[-20000:]
    sys.path.insert(0, str(WORKER.parent))
    try:
        import coprs_processes
    finally:
        sys.path.pop(0)
    coprs_processes.train(one, gradient_accumulation_steps=2)
    ours, theirs = (json.loads((folder / "figures.json").read_text()) for folder in (two, one))
    assert ours["world_size"] == 2 and theirs["world_size"] == 1
    assert len(ours["log"]) == len(theirs["log"]) == 2
    for our_entry, their_entry in zip(ours["log"], theirs["log"], strict=True):
        for name in LOGGED:
            assert our_entry[name] == pytest.approx(their_entry[name], rel=1e-4, abs=1e-5), name
        assert our_entry["loss/dice"] > 0.1 and 0 < our_entry["rewards/format/mean"] < 1
    first, second = (
        CoPRSForSegmentation.from_pretrained(folder / "whole").state_dict() for folder in (two, one)
    )
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 5e-5
