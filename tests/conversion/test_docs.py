"""The memory table of docs/weights.md matches the configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation

DOCUMENT = Path(__file__).parents[2] / "docs" / "weights.md"


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_memory_table(name):
    with torch.device("meta"):
        model = ConceptSegForSegmentation(ConceptSegConfig.from_preset(name))

    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    linear = sum(
        module.weight.numel()
        for path, module in model.vlm.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    )
    vlm, rest = 2 * count(model.vlm), 4 * (count(model.ctm) + count(model.sam))
    sizes = [
        vlm,
        4 * count(model.ctm),
        4 * count(model.sam),
        vlm + rest,
        vlm + rest - linear,  # one byte instead of two
        vlm
        + rest
        - 2 * linear
        + linear * (1 / 2 + 4 / 64),  # 4 bits per weight, and a float32 scale per block of 64
    ]
    row = f"| {name.upper()} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |"
    assert row in DOCUMENT.read_text(encoding="utf-8").splitlines()
