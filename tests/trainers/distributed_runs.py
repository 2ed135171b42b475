"""Comparison of the results of `two_processes.py` with one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch


def compare(folder: Path, other: Path, names: Sequence[str], model_class: Any) -> dict:
    """Assert that two runs have the same losses (within 1e-5) and final weights, and return the results.

    Adam divides each gradient by its own size. Where a gradient is only rounding noise, the step has full size in an
    arbitrary direction, so a few weights may differ by up to the sum of the learning rates (2e-4).
    """
    ours, theirs = (json.loads((path / "figures.json").read_text()) for path in (folder, other))
    assert len(ours["log"]) == len(theirs["log"]) == 3
    for our_entry, their_entry in zip(ours["log"], theirs["log"], strict=True):
        for name in names:
            assert our_entry[name] == pytest.approx(their_entry[name], abs=1e-5), (name, our_entry["step"])
    first, second = (model_class.from_pretrained(path / "whole").state_dict() for path in (folder, other))
    differences = torch.cat([(weight - second[name]).abs().flatten() for name, weight in first.items()])
    assert (differences > 2e-5).float().mean() < 1e-4 and differences.max() < 2e-4, differences.max()
    return ours


def check_resumed(figures: dict, names: Sequence[str]) -> None:
    """Check that resuming at step 2 gives the same step 3, and that the frozen part has not changed."""
    for name in names:
        assert figures["resumed"][name] == pytest.approx(figures["log"][2][name], abs=1e-7), name
    assert figures["resumed_weights"] == figures["final_weights"]
    assert figures["frozen_unchanged"]
