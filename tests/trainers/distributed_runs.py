"""Comparison of the results of `two_processes.py` with one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def compare(
    folder: Path, other: Path, names: Sequence[str], model_class: Any, tolerance: float = 2e-5
) -> dict:
    """Assert that two runs have the same losses (within 1e-5) and final weights, and return the results."""
    ours, theirs = (json.loads((path / "figures.json").read_text()) for path in (folder, other))
    assert len(ours["log"]) == len(theirs["log"]) == 3
    for our_entry, their_entry in zip(ours["log"], theirs["log"], strict=True):
        for name in names:
            assert our_entry[name] == pytest.approx(their_entry[name], abs=1e-5), (name, our_entry["step"])
    first, second = (model_class.from_pretrained(path / "whole").state_dict() for path in (folder, other))
    assert max((weight - second[name]).abs().max().item() for name, weight in first.items()) < tolerance
    return ours


def check_resumed(figures: dict, names: Sequence[str]) -> None:
    """Check that resuming at step 2 gives the same step 3, and that the frozen part has not changed."""
    for name in names:
        assert figures["resumed"][name] == pytest.approx(figures["log"][2][name], abs=1e-7), name
    assert figures["resumed_weights"] == figures["final_weights"]
    assert figures["frozen_unchanged"]
