"""Concept tokens with a LoRA adapter of SAM 3, merged into the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from conceptseg_trainers.sam_lora import ADAPTED, ENCODER, tune_concept_with_lora

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, Reference, nano_checkpoint
from conceptseg_hf.concept_tuning import TuningOptions, tune_concept
from conceptseg_hf.data import load_benchmark

OPTIONS = TuningOptions(num_tokens=2, steps=40, batch_size=4, learning_rate=1e-4, adapter_learning_rate=1e-2)


@pytest.fixture(scope="module")
def references():
    samples = load_benchmark("concept-shapes", split="test", limit=300)
    return [Reference(s.image, mask=s.mask) for s in samples if s.family == "shadow"][:8]


def load():
    path = nano_checkpoint()
    return ConceptSegForSegmentation.from_pretrained(path), ConceptSegProcessor.from_pretrained(path)


def test_adapter_is_merged_and_fits_better_than_tokens_alone(references, tmp_path):
    model, processor = load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = {name: type(module) for name, module in model.named_modules()}
    required = [parameter.requires_grad for parameter in model.parameters()]
    tokens_only = tune_concept(model, processor, "star", references, options=OPTIONS)
    concept = tune_concept_with_lora(model, processor, "star", references, options=OPTIONS, rank=4)
    after = model.state_dict()
    assert list(after) == list(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(name.removeprefix("sam.").split(".")[0] in ADAPTED for name in changed)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert concept.score > tokens_only.score + 0.1

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = ConceptSegForSegmentation.from_pretrained(tmp_path)
    inputs = processor([references[0].image], "star")
    masks = [
        np.asarray(each.segment(inputs, processor=processor, router="sam_only", concept=concept)[0].mask)
        for each in (model, saved)
    ]
    assert np.array_equal(*masks) and masks[0].any()
    with pytest.raises(ValueError, match="made with other weights"):
        load()[0].segment(inputs, processor=processor, concept=concept)


def test_image_encoder_is_adapted_on_request(references):
    model, processor = load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = TuningOptions(num_tokens=2, steps=4, batch_size=2)
    concept = tune_concept_with_lora(
        model, processor, "star", references, options=options, rank=2, adapt_encoder=True
    )
    after = model.state_dict()
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert list(after) == list(before) and ENCODER in changed and changed <= {ENCODER, *ADAPTED}
    assert not any(parameter.grad is not None for parameter in model.parameters())
    inputs = processor([references[0].image], "star")
    assert model.segment(inputs, processor=processor, router="sam_only", concept=concept)[0].mask is not None


def test_an_error_leaves_the_model_unchanged(references):
    model, processor = load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="reference 0 has no mask"):
        tune_concept_with_lora(model, processor, "star", [Reference(references[0].image)] * 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.state_dict()) == len(before)
