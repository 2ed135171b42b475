"""Induction: candidate phrases, selection by verification, thresholds, and refined tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conceptseg_hf import (
    ConceptPrompt,
    ConceptSegForSegmentation,
    ConceptSegProcessor,
    Reference,
    induce,
    nano_checkpoint,
)
from conceptseg_hf.boxes import foreground_iou
from conceptseg_hf.candidates import Candidate, decode_candidate, decode_mean_tokens, encode_examples
from conceptseg_hf.data import ConceptShapes, load_benchmark
from conceptseg_hf.induction import MEAN_TOKENS, REFINED, verify
from conceptseg_hf.rules import leave_one_out


@pytest.fixture(scope="module")
def nano():
    path = nano_checkpoint()
    return ConceptSegForSegmentation.from_pretrained(path), ConceptSegProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def shadows() -> list:
    """Samples about shadows: a concept that the embedded checkpoint knows."""
    samples = load_benchmark("concept-shapes", split="test", limit=120)
    return [sample for sample in samples if sample.family == "shadow"]


def as_reference(sample) -> Reference:
    return Reference(sample.image, mask=sample.mask)


def test_induced_concept_segments_other_images(nano, shadows, tmp_path):
    model, processor = nano
    references = [as_reference(sample) for sample in shadows[:3]]
    concept = induce(model, processor, "shadow", references)
    assert concept.phrases and concept.is_reliable and concept.concept_embeds is None
    assert concept.scores[0].score == concept.score > max(row.score for row in concept.scores) - 0.03
    assert all(len(row.per_reference) == 3 for row in concept.scores)
    targets = shadows[3:8]
    inputs = processor([sample.image for sample in targets], "shadow")
    results = model.segment(
        inputs, processor=processor, concept=ConceptPrompt.load(concept.save(tmp_path / "c"))
    )
    assert {result.route for result in results} == {"concept"}
    ious = [
        np.logical_and(a, b).sum() / np.logical_or(a, b).sum()
        for a, b in ((np.asarray(r.mask) > 0, np.asarray(s.mask) > 0) for r, s in zip(results, targets))
    ]
    assert np.mean(ious) > 0.7
    assert len(concept.reasoning_ious) == 3 and np.mean(concept.reasoning_ious) == concept.reasoning_score
    assert concept.rule_score > 0.7, "the rule that the VLM writes for shadows, or the phrase"
    assert len(concept.rule_ious) == 3 and min(concept.rule_ious) > 0.2
    again = induce(model, processor, "shadow", references)
    assert again.scores == concept.scores and again.phrases == concept.phrases


def test_negatives_set_the_threshold(nano, shadows):
    model, processor = nano
    others = [s for s in load_benchmark("concept-shapes", split="test", limit=60) if s.family == "attribute"]
    references = [as_reference(sample) for sample in shadows[:2]]
    without = induce(model, processor, "shadow", references)
    concept = induce(
        model, processor, "shadow", references, negatives=[sample.image for sample in others[:4]]
    )
    assert concept.threshold != without.threshold and 0 < concept.threshold < 1
    inputs = processor([sample.image for sample in others[4:8]], "shadow")
    results = model.segment(
        inputs, processor=processor, concept=concept, generation_config={"max_new_tokens": 8}
    )
    assert sum(result.route == "concept" for result in results) <= 1


def test_phrases_of_one_image_do_not_verify_themselves(nano, shadows):
    """Three different objects have names but no concept in common: each name only explains its own image."""
    model, processor = nano
    samples = [s for s in load_benchmark("concept-shapes", split="test", limit=60) if s.family == "saliency"][
        :3
    ]
    concept = induce(model, processor, samples[0].prompt, [as_reference(sample) for sample in samples])
    assert not concept.is_reliable and "full reasoning" in concept.summary()
    result = model.segment(
        processor([samples[0].image], samples[0].prompt), processor=processor, concept=concept,
        generation_config={"max_new_tokens": 8},
    )[0]  # fmt: skip
    assert result.route == "reasoning"


def test_edited_phrases_are_verified(nano, shadows):
    model, processor = nano
    references = [as_reference(sample) for sample in shadows[:2]]
    concept = induce(model, processor, "shadow", references)
    good, bad = (
        verify(concept.with_phrase(phrase), model, processor, references) for phrase in ("shadow", "star")
    )
    assert good.score > 0.7 > bad.score and good.scores[0].name == "shadow"
    assert good.rule_score == bad.rule_score and good.rule_score > 0.7
    star = verify(concept.with_rule("find the red star"), model, processor, references)
    assert star.rule == "find the red star" and star.rule_score < good.rule_score


def test_candidates_replace_phrases_that_explain_the_references_worse(nano, shadows):
    model, processor = nano
    references = [as_reference(sample) for sample in shadows[:2]]
    concept = induce(model, processor, "shadow", references)
    star = concept.with_phrase("star")
    found = verify(star, model, processor, references, candidates=["circle", "shadow", "star", "shadow"])
    assert found.phrases == ("shadow",) and found.score == pytest.approx(concept.score)
    assert found.scores[0].name == "shadow"
    assert sorted(row.name for row in found.scores) == ["circle", "shadow", "star"]
    kept = verify(concept, model, processor, references, candidates=["star"])
    assert kept.phrases == ("shadow",) and [row.name for row in kept.scores] == ["shadow", "star"]
    width = model.config.ctm_config.sam_hidden_size
    tokens = replace(star, concept_embeds=torch.zeros(4, width))
    assert verify(tokens, model, processor, references).concept_embeds is not None
    assert verify(tokens, model, processor, references, candidates=["shadow"]).concept_embeds is None


def test_progress_is_reported_to_a_function(nano, shadows):
    model, processor = nano
    references = [as_reference(sample) for sample in shadows[:2]]
    calls = []
    induce(
        model,
        processor,
        "shadow",
        references,
        num_samples=2,
        refine=True,
        progress=lambda *c: calls.append(c),
    )
    completions = [call for call in calls if call[2] == "completions"]
    steps = [call for call in calls if call[2] == "steps"]
    assert completions == [(done, 6, "completions") for done in range(7)], (
        "2 x 2 completions, and 2 with all references"
    )
    assert [done for done, *_ in steps] == list(range(len(steps))) and len(steps) > 80


def test_refined_tokens_are_a_candidate_and_seeded(nano, shadows):
    model, processor = nano
    references = [as_reference(sample) for sample in shadows[:2]]
    training = {module: module.training for module in model.modules()}
    first, second = (induce(model, processor, "shadow", references, refine=True, seed=1) for _ in range(2))
    assert REFINED in [row.name for row in first.scores] and first.scores == second.scores
    assert (first.concept_embeds is None) == (second.concept_embeds is None)
    if first.concept_embeds is not None:
        assert torch.equal(first.concept_embeds, second.concept_embeds)
    assert all(module.training is mode for module, mode in training.items())
    assert all(parameter.grad is None for parameter in model.sam.parameters())


def test_refusals(nano, shadows):
    model, processor = nano
    reference = as_reference(shadows[0])
    with pytest.raises(ValueError, match="no references"):
        induce(model, processor, "shadow", [])
    with pytest.raises(ValueError, match="reference 1 has neither a mask nor a box"):
        induce(model, processor, "shadow", [reference, Reference(shadows[1].image)])
    with pytest.raises(ValueError, match="num_samples is 0"):
        induce(model, processor, "shadow", [reference], num_samples=0)
    with pytest.raises(ValueError, match="prompt"):
        induce(model, processor, " ", [reference])


def test_concept_tokens_of_a_reference_do_not_verify_themselves(nano, shadows):
    model, processor = nano
    references = [as_reference(sample) for sample in shadows[:3]]
    examples = encode_examples(model, processor, references, [shadows[3].image, shadows[4].image])
    torch.manual_seed(0)
    tokens = torch.randn(3, 8, model.config.ctm_config.sam_hidden_size)
    scored = decode_mean_tokens(model, processor, "mean", "shadow", tokens, examples)
    assert torch.equal(scored.candidate.tokens, tokens.mean(0)) and scored.candidate.phrase == "shadow"
    means = [
        tokens[[1, 2]].mean(0),
        tokens[[0, 2]].mean(0),
        tokens[[0, 1]].mean(0),
        tokens.mean(0),
        tokens.mean(0),
    ]
    for row, mean in enumerate(means):
        alone = decode_candidate(model, processor, Candidate("mean", "shadow", mean), examples)
        assert scored.presences[row] == pytest.approx(alone.presences[row], abs=1e-5)
        if row < 3:
            assert scored.ious[row] == pytest.approx(alone.ious[row], abs=0.01)


def test_mean_concept_tokens_are_a_candidate(nano, shadows):
    model, processor = nano
    references = [as_reference(sample) for sample in shadows[:3]]
    concept = induce(model, processor, "shadow", references)
    [row] = [row for row in concept.scores if row.name == MEAN_TOKENS]
    assert row.score > 0.8 and len(row.per_reference) == 3
    assert concept.concept_embeds is None, "the phrase is about as good, and simpler"
    alone = induce(model, processor, "shadow", references[:1])
    assert MEAN_TOKENS not in [row.name for row in alone.scores], (
        "there is no other reference to score them on"
    )


def test_many_references_with_a_wrong_mark(nano):
    """More references than a mosaic holds; the VLM is shown four that the concept explains."""
    model, processor = nano
    shapes = ConceptShapes("test")
    *shown, target = (shapes[i] for i in range(13, 13 + 24 * 12, 24))
    assert {sample.family for sample in shown} == {"shadow"}
    references = [as_reference(sample) for sample in shown]
    wrong = np.asarray(shown[1].mask)[::-1, ::-1]
    references[1] = Reference(shown[1].image, mask=Image.fromarray(np.ascontiguousarray(wrong)))
    calls = []
    concept = induce(model, processor, "shadow", references, progress=lambda *call: calls.append(call))
    assert calls[-1] == (11 + 4, 11 + 4, "completions")
    assert len(concept.scores[0].per_reference) == len(concept.reasoning_ious) == 11
    assert concept.worst_reference == 1 and concept.scores[0].per_reference[1] < 0.2 and concept.score > 0.6
    useful = concept.useful_references()
    assert len(useful) == 4 and 1 not in useful
    inputs = processor([target.image], "shadow", [references[i] for i in useful])
    [result] = model.segment(inputs, processor=processor, concept=concept, router="full_reasoning")
    assert (
        result.route == "reasoning" and foreground_iou(np.asarray(result.mask), np.asarray(target.mask)) > 0.7
    )


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [[0]]),
        (3, [[1, 2], [0, 2], [0, 1]]),
        (5, [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3]]),
        (6, [[1, 2, 3, 4], [2, 3, 4, 5], [0, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 5], [0, 1, 2, 3]]),
    ],
)
def test_examples_of_each_target(count, expected):
    class Prepared:
        def prepare(self, image, prompt, references):
            return image, [reference.image for reference in references]

    references = [Reference(f"{number}.png") for number in range(count)]
    assert leave_one_out(Prepared(), "star", references) == [
        (f"{number}.png", [f"{other}.png" for other in others]) for number, others in enumerate(expected)
    ]
