"""Tests of the object choice in records and reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from conceptseg_hf.data import ConceptSample
from conceptseg_hf.data.sample import Candidate
from conceptseg_hf.evaluation.records.choice import choice_values
from conceptseg_hf.evaluation.reporting.choice_table import choice_table


def _mask(*columns: int) -> np.ndarray:
    mask = np.zeros((4, 10), dtype=bool)
    mask[:, list(columns)] = True
    return mask


SAMPLE = ConceptSample(
    image=Image.new("RGB", (10, 4)),
    mask=Image.fromarray(_mask(0, 1).astype(np.uint8) * 255),
    prompt="p",
    level="CR",
    group="which one",
    family="f",
    candidates=(
        Candidate("target", _mask(0, 1)),
        Candidate("sibling", _mask(3, 4)),
        Candidate("other reading", _mask(6, 7)),
        Candidate("anchor", _mask(8, 9)),
    ),
    stratum="identical look",
)


def test_the_candidate_with_the_largest_overlap_is_chosen() -> None:
    values = choice_values(SAMPLE, _mask(1, 3, 4))
    assert values == {"stratum": "identical look", "chosen": "sibling", "sibling_fraction": 8 / 16}
    assert choice_values(SAMPLE, _mask(0, 1, 2))["chosen"] == "target"
    assert choice_values(SAMPLE, _mask(8))["chosen"] == "anchor"
    assert choice_values(SAMPLE, _mask(8))["sibling_fraction"] == 0.0  # the prompt names the anchor


def test_no_overlap_chooses_nothing() -> None:
    assert choice_values(SAMPLE, _mask(5))["chosen"] == "nothing"
    assert choice_values(SAMPLE, _mask())["sibling_fraction"] == 0.0


def test_samples_without_candidates_have_no_choice() -> None:
    assert choice_values(replace(SAMPLE, candidates=()), _mask(0)) == {}
    assert choice_table([{"group": "saliency"}]) == []


def test_the_table_counts_roles_by_stratum() -> None:
    records = [
        {"group": "which one", "stratum": "identical look", "chosen": chosen}
        for chosen in ("target", "target", "sibling", "nothing")
    ]
    header, _, row = choice_table(records)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")][3:] == ["target", "nothing", "sibling"]
    assert cells == ["which one", "identical look", "4", "50.0", "25.0", "25.0"]
