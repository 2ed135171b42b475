"""Tests of the precision of trainings from scratch."""

from __future__ import annotations

import pytest
import torch
from conceptseg_trainers.from_scratch import precision

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)],
)
def test_bfloat16_needs_instructions_for_it(monkeypatch, capabilities, expected) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.has_fast_bfloat16("cpu") is expected and precision.has_fast_bfloat16("cuda")
    with precision.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected else torch.float32)
    vlm = ConceptSegForSegmentation.from_pretrained(nano_checkpoint()).vlm
    precision.prepare_for_bfloat16(vlm, "cpu")
    assert vlm.config._attn_implementation == ("eager" if expected else "sdpa")
