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

SETTINGS = {"max_new_tokens": 24, "suppress_tokens": [2]}  # random models would end most completions at once


@pytest.fixture(scope="session")
def engine(model, processor):
    """One engine for all tests of a family; building it takes seconds."""
    from conceptseg_hf.vllm_engine import VllmEngine

    return VllmEngine(model, processor, max_model_len=512, max_num_seqs=4)


@pytest.fixture
def samples(processor, picture):
    """Samples without a mosaic, and with mosaics of two and one references."""
    references = [Reference(picture(10), box=(2, 2, 20, 20)), Reference(picture(11), box=(5, 5, 40, 30))]
    return [
        processor.prepare(picture(0), "red circle"),
        processor.prepare(picture(1), "star", references),
        processor.prepare(picture(2), "find the same object", references[:1]),
    ]


@pytest.mark.parametrize("vlm_family", ["qwen3_vl", "internvl"], indirect=True, scope="session")
def test_tokens_states_and_masks_equal_generate(model, processor, engine, samples) -> None:
    expected = generate_with_states(model.vlm, processor.collate(samples), SETTINGS)
    assert expected.mask.all() and expected.mask.shape == (3, 24)
    options = {
        "processor": processor,
        "router": "full_reasoning",
        "generation_config": SETTINGS,
        "return_logits": True,
    }
    results = model.segment(samples, **options)
    actual = engine.generate(model, processor, samples, SETTINGS)
    assert torch.equal(actual.mask, expected.mask)
    assert torch.equal(actual.token_ids[actual.mask], expected.token_ids[expected.mask])
    assert (actual.hidden_states - expected.hidden_states).abs().max() < 2e-4
    model.set_vlm_engine(engine)
    try:
        for result, other in zip(results, model.segment(samples, **options), strict=True):
            assert result.completion == other.completion
            assert np.abs(np.asarray(result.mask_logits) - np.asarray(other.mask_logits)).max() < 0.02
    finally:
        model.set_vlm_engine("transformers")

    # The completions depend on the image: with the pixels of another one, the engine writes other tokens.
    pixels = [sample.pixel_values for sample in samples]
    try:
        for sample in samples:
            sample.pixel_values = sample.pixel_values.flip(0).neg()
        changed = engine.generate(model, processor, samples, SETTINGS)
        expected = generate_with_states(model.vlm, processor.collate(samples), SETTINGS)
    finally:
        for sample, original in zip(samples, pixels, strict=True):
            sample.pixel_values = original
    assert torch.equal(changed.token_ids[changed.mask], expected.token_ids[expected.mask])
    assert not torch.equal(changed.token_ids, actual.token_ids)


@pytest.mark.parametrize("vlm_family", ["qwen3_vl"], indirect=True, scope="session")
def test_completions_depend_on_deepstack_features(model, processor, engine, samples, monkeypatch) -> None:
    actual = engine.generate(model, processor, samples, SETTINGS)
    encode, width = Qwen3VlFamily.encode_images, model.config.hidden_size
    monkeypatch.setattr(
        Qwen3VlFamily,
        "encode_images",
        lambda *args: [torch.cat([each[:, :width], 0 * each[:, width:]], dim=1) for each in encode(*args)],
    )
    reset_caches(engine._llm)
    without = engine.generate(model, processor, samples, SETTINGS)
    reset_caches(engine._llm)
    assert not torch.equal(without.token_ids, actual.token_ids)
