"""Concept tokens tuned on many images: they learn, are seeded, are scored on withheld images, and can be loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conceptseg_hf import (
    ConceptPrompt,
    ConceptSegForSegmentation,
    ConceptSegProcessor,
    Reference,
    concept_tuning,
    nano_checkpoint,
)
from conceptseg_hf.concept_tuning import TuningOptions, split, tune_concept
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.evaluation import foreground_iou

OPTIONS = TuningOptions(num_tokens=4, steps=40, batch_size=4)


@pytest.fixture(scope="module")
def nano():
    path = nano_checkpoint()
    return ConceptSegForSegmentation.from_pretrained(path), ConceptSegProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def lesions():
    """Samples of a family whose prompt the checkpoint does not know when it is replaced by another word."""
    samples = load_benchmark("concept-shapes", split="test", limit=400)
    return [sample for sample in samples if sample.family == "shadow"][:14]


def as_reference(sample) -> Reference:
    return Reference(sample.image, mask=sample.mask)


def mean_iou(nano, samples, concept=None):
    model, processor = nano
    inputs = processor([sample.image for sample in samples], "star")
    results = model.segment(inputs, processor=processor, router="sam_only", concept=concept)
    pairs = zip(results, samples, strict=True)
    return np.mean([foreground_iou(np.asarray(r.mask) > 0, np.asarray(s.mask) > 0) for r, s in pairs])


def test_tokens_teach_a_wrong_word_its_meaning(nano, lesions, tmp_path):
    """Under the word "star", SAM 3 segments stars; tuned tokens before it make it segment shadows."""
    model, processor = nano
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    required = [parameter.requires_grad for parameter in model.parameters()]
    train, test = lesions[:10], lesions[10:]
    concept = tune_concept(model, processor, "star", [as_reference(s) for s in train], options=OPTIONS)
    assert concept.concept_embeds.shape == (4, model.config.ctm_config.sam_hidden_size)
    assert concept.phrases == ("star",) and len(concept.scores[0].per_reference) == 2
    assert concept.score > 0.6 and concept.is_reliable
    loaded = ConceptPrompt.load(concept.save(tmp_path / "shadow.safetensors"))
    before, after = mean_iou(nano, test), mean_iou(nano, test, loaded)
    assert before < 0.1 and after > 0.6
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tuning_is_seeded_and_does_not_depend_on_the_cache(nano, lesions, monkeypatch):
    model, processor = nano
    references = [as_reference(sample) for sample in lesions[:6]]
    short = TuningOptions(num_tokens=2, steps=6, batch_size=4)
    first = tune_concept(model, processor, "star", references, options=short)
    monkeypatch.setattr(concept_tuning, "_MAX_CACHE", 0)
    second = tune_concept(model, processor, "star", references, options=short)
    assert torch.allclose(first.concept_embeds, second.concept_embeds, atol=1e-5)
    other = tune_concept(
        model,
        processor,
        "star",
        references,
        options=TuningOptions(num_tokens=2, steps=6, batch_size=4, seed=1),
    )
    assert not torch.allclose(first.concept_embeds, other.concept_embeds, atol=1e-3)


def test_negatives_lower_the_presence(nano, lesions):
    model, processor = nano
    others = [s for s in load_benchmark("concept-shapes", split="test", limit=60) if s.family == "attribute"]
    negatives = [sample.image for sample in others[:6]]
    references = [as_reference(sample) for sample in lesions[:8]]
    concept = tune_concept(model, processor, "star", references, negatives, options=OPTIONS)
    inputs = processor([sample.image for sample in [*lesions[10:13], *others[6:9]]], "star")
    results = model.segment(inputs, processor=processor, router="sam_only", concept=concept)
    presences = [result.decode_presence for result in results]
    assert np.mean(presences[:3]) > np.mean(presences[3:]) + 0.2


def test_more_withheld_references_than_can_be_verified(nano, lesions):
    model, processor = nano
    references = [as_reference(sample) for sample in lesions] * 4
    concept = tune_concept(
        model, processor, "star", references, options=TuningOptions(num_tokens=2, steps=1, batch_size=2)
    )
    assert len(split(references)[1]) == 11 and len(concept.scores[0].per_reference) == 9


def test_split_withholds_every_fifth_and_at_most_40():
    for count, withheld in ((2, 1), (4, 1), (10, 2), (20, 4), (300, 40)):
        references = [Reference(f"{number}.png") for number in range(count)]
        tuned, held_out = split(references)
        assert len(held_out) == withheld and len(tuned) == count - withheld
        assert {reference.image for reference in [*tuned, *held_out]} == {r.image for r in references}


def test_refusals(nano, lesions):
    model, processor = nano
    reference = as_reference(lesions[0])
    with pytest.raises(ValueError, match="there are 1 references; give at least two"):
        tune_concept(model, processor, "shadow", [reference])
    with pytest.raises(ValueError, match="reference 1 has no mask"):
        tune_concept(
            model, processor, "shadow", [reference, Reference(lesions[1].image), reference, reference]
        )
    with pytest.raises(ValueError, match="prompt"):
        tune_concept(model, processor, " ", [reference, reference])
    with pytest.raises(ValueError, match="steps is 0"):
        TuningOptions(steps=0)
