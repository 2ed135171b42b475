"""The memory tables of docs/weights.md and docs/qwen3.md match the configurations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation
from conceptseg_hf.vlm_families import get_family

DOCS = Path(__file__).parents[2] / "docs"


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build(preset: str) -> tuple[ConceptSegForSegmentation, int]:
    """Return the model on the meta device, and the number of weights of the VLM that are quantized."""
    with torch.device("meta"):
        model = ConceptSegForSegmentation(ConceptSegConfig.from_preset(preset))
    linear = sum(
        module.weight.numel()
        for path, module in model.vlm.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    )
    return model, linear


@pytest.mark.parametrize(
    ("preset", "name"),
    [("3b", "3B"), ("7b", "7B"), *((f"qwen3-{size}b", f"Qwen3-VL {size}B") for size in (2, 4, 8))],
)
def test_memory_table(preset, name):
    model, linear = build(preset)
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
    row = f"| {name} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |"
    assert row in (DOCS / "weights.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("size", ["2B", "4B", "8B"])
def test_memory_table_of_training_from_qwen3(size):
    model, linear = build(f"qwen3-{size.lower()}")
    pattern = get_family(model.vlm.config).lora_target_modules
    adapted = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    rank = 16  # of the recipes
    adapters = sum(rank * (module.in_features + module.out_features) for module in adapted)
    vlm, sam = 2 * count(model.vlm), 4 * count(model.sam)
    four_bits = vlm - 2 * linear + linear * (1 / 2 + 4 / 64)
    # Trained parameters in float32: weights, gradients, and two states of AdamW.
    ctm, adapters = 16 * count(model.ctm), 16 * adapters
    sharded = count(model.vlm) * (2 + 14 / 8)  # gradients in bfloat16, float32 weights and states
    rows = {
        "stage I": (vlm, sam, ctm, 0),
        "stage II, adapters, 4 bits": (four_bits, sam, ctm + adapters, 0),
        "stage II, adapters": (vlm, sam, ctm + adapters, 0),
        "stage II, all weights, 8 GPUs": (sharded, sam, ctm, vlm),
    }
    lines = (DOCS / "qwen3.md").read_text(encoding="utf-8").splitlines()
    for setting, parts in rows.items():
        cells = [f"{value / 1e9:.1f}" if value else "-" for value in (*parts, sum(parts))]
        assert f"| {size} | {setting} | {' | '.join(cells)} |" in lines
