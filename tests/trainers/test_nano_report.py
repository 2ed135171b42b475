"""Test of the command that evaluates a nano checkpoint and writes its model card."""

from __future__ import annotations

import shutil
import sys

import pytest
from conceptseg_trainers.nano import report

from conceptseg_hf import nano_checkpoint


@pytest.mark.slow
def test_card_contains_all_tables(tmp_path, monkeypatch) -> None:
    checkpoint = shutil.copytree(nano_checkpoint(), tmp_path / "nano")
    monkeypatch.setattr(
        sys,
        "argv",
        ["report", str(checkpoint), "--limit", "4", "--output-dir", str(tmp_path), "--notes", "One run."],
    )
    report.main()
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "\nOne run.\n" in card
    assert "The first 4 samples of each split" in card
    assert card.count("| CR, box IoU of completions |") == 1
    assert "| test-compositional | full_reasoning |" in card
    assert "| test-rules | hidden rule | 4 |" in card
    assert "| test, which one: shared noun | 4 |" in card
    assert "{" not in card
