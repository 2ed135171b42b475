"""Completions of vLLM against those of `generate`, with tiny random models of other families than the checkpoint's."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM needs an environment of its own: run `make test-vllm`")

import torch

from conceptseg_hf import Reference
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.vllm_runtime import reset_caches
from conceptseg_hf.vlm_families.qwen3_vl import Qwen3VlFamily

SETTINGS = {"max_new_tokens": 24}


@pytest.mark.parametrize("vlm_family", ["qwen3_vl"], indirect=True, scope="session")
def test_tokens_states_and_masks_of_qwen3_equal_generate(model, processor, picture, monkeypatch) -> None:
    from conceptseg_hf.vllm_engine import VllmEngine

    references = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11), box=(5, 5, 40, 30))]
    samples = [
        processor.prepare(picture(0), "red circle"),
        processor.prepare(picture(1), "star", references),
        processor.prepare(picture(2), "find the same object", references[:1]),
    ]
    expected = generate_with_states(model.vlm, processor.collate(samples), SETTINGS)
    options = {
        "processor": processor,
        "router": "full_reasoning",
        "generation_config": SETTINGS,
        "return_logits": True,
    }
    results = model.segment(samples, **options)
    engine = VllmEngine(model, processor, max_model_len=512, max_num_seqs=4)
    actual = engine.generate(model, processor, samples, SETTINGS)
    assert torch.equal(actual.token_ids[actual.mask], expected.token_ids[expected.mask])
    assert (actual.hidden_states - expected.hidden_states).abs().max() < 2e-3
    model.set_vlm_engine(engine)
    try:
        for result, other in zip(results, model.segment(samples, **options), strict=True):
            assert result.completion == other.completion
            assert np.abs(np.asarray(result.mask_logits) - np.asarray(other.mask_logits)).max() < 0.02
    finally:
        model.set_vlm_engine("transformers")

    # The engine reads the features of the DeepStack layers: without them, it writes other tokens.
    encode, width = Qwen3VlFamily.encode_images, model.config.hidden_size
    monkeypatch.setattr(
        Qwen3VlFamily,
        "encode_images",
        lambda *args: [torch.cat([each[:, :width], 0 * each[:, width:]], dim=1) for each in encode(*args)],
    )
    reset_caches(engine._llm)
    without = engine.generate(model, processor, samples, SETTINGS)
    assert not torch.equal(without.token_ids, actual.token_ids)
