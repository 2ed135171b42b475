"""Induction of a concept from references: the VLM proposes phrases, and SAM 3 verifies them on the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .candidates import (
    Candidate,
    Examples,
    Scored,
    combine,
    decode_candidate,
    decode_mean_tokens,
    encode_examples,
    presence_threshold,
    score_table,
    select_candidate,
)
from .concept_prompt import NUM_EXAMPLES, ConceptPrompt, best_indices, concept_hash
from .devices import execution_device, loaded
from .images import ImageInput
from .inference import Segmenter, SegmentSettings, evaluating
from .inputs import PreparedSample
from .losses import segmentation_loss
from .modeling_conceptseg import ConceptSegForSegmentation
from .outputs import RawSegmentation
from .phrases import Written, candidate_phrases
from .processing_conceptseg import ConceptSegProcessor
from .progress import ProgressCalls, ProgressFunction, progress_bar
from .references import Reference
from .router import ShortcutRouter
from .rules import leave_one_out, mask_ious, select_rule, verify_rule, with_all_references

REFINED = "refined tokens"
"""Name of the candidate with tokens that are tuned on the references."""

MEAN_TOKENS = "mean concept tokens"
"""Name of the candidate with the mean of the concept tokens Z of the references."""

_SAMPLING = {"do_sample": True, "temperature": 1.0}
_REFINED_TOKENS, _REFINE_STEPS, _REFINE_RATE = 4, 40, 0.05


@torch.no_grad()
def induce(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    prompt: str,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput] = (),
    num_samples: int = 1,
    refine: bool = False,
    seed: int = 0,
    progress: bool | ProgressFunction = False,
) -> ConceptPrompt:
    """Induce a concept from references with masks or boxes, to be applied to other images by SAM 3 alone.

    The VLM completes the prompt for each reference as the target, with other references as examples, and again with the
    examples that it is shown for other images: all references, or the four that a first round explains best. Its
    answers and their words, the noun phrases of its rules, and the user's prompt are candidate phrases; the mean of its
    concept tokens Z, with the best phrase, is a further candidate. SAM 3 decodes every candidate on all references; the
    candidate with the highest mean IoU is selected, or the simplest one of those that are about as good. A phrase that
    comes from a single reference is scored on the others, and so are its concept tokens. The rules that the VLM wrote,
    and the selected phrase, are verified by completions that start with them.

    Args:
        model: The model.
        processor: Its processor.
        prompt: The user's prompt.
        references: Any number of references, each with a mask or boxes.
        negatives: Images without the concept, which are used for the threshold.
        num_samples: Completions per reference with the others as examples: one greedy, the others sampled.
        refine: Also tune a few tokens in SAM 3's prompt space on the masks, with SAM 3 frozen. They are a candidate
            like the others, scored on references that they were not tuned on, so they need two references.
        seed: Random seed of sampling and tuning.
        progress: Whether to show a progress bar, or a function to call instead.

    Returns:
        The concept with the scores of all candidates.

    Raises:
        ValueError: If the prompt or a reference cannot be used, or there are no references with a mask or box.
    """
    if not isinstance(model, ConceptSegForSegmentation):
        raise ValueError(
            f"induce: model is a {type(model).__name__}, which applies no concepts; use a ConceptSeg checkpoint."
        )
    if num_samples < 1:
        raise ValueError(f"induce: num_samples is {num_samples}; use at least 1.")
    processor.check_prompt(prompt)
    with evaluating(model), loaded(model):
        examples = encode_examples(model, processor, references, negatives)
        samples = leave_one_out(processor, prompt, references)
        written, greedy, decoded = _propose(
            model, processor, prompt, references, samples, examples, num_samples, seed, progress
        )
        results = processor.post_process_concept_segmentation(greedy)
        reasoning_ious = mask_ious(results, examples.masks)
        phrases_by_source = candidate_phrases(prompt, written)
        scored = _score(model, processor, phrases_by_source, examples, decoded)
        best_phrase = max(scored, key=lambda each: each.score).candidate.phrase or prompt
        tokens = [each.concept_embeds for each in greedy if each.concept_embeds is not None]
        if len(tokens) == len(references) > 1:
            scored.append(
                decode_mean_tokens(model, processor, MEAN_TOKENS, best_phrase, torch.stack(tokens), examples)
            )
        if refine and len(examples) > 1:
            scored.append(_refine(model, processor, best_phrase, examples, seed, progress))
        best, phrases = select_candidate(scored)
        rule, rule_score, rule_ious = select_rule(
            model,
            processor,
            phrases[0] if phrases else None,
            phrases_by_source.get(phrases[0]) if phrases else None,
            written,
            samples,
            examples.masks,
        )
    return ConceptPrompt(
        prompt=prompt,
        phrases=phrases,
        rule=rule,
        concept_embeds=None if best.candidate.tokens is None else best.candidate.tokens.cpu(),
        threshold=presence_threshold(best, len(examples)),
        score=best.score,
        scores=score_table([best, *(each for each in scored if each is not best)]),
        model_hash=concept_hash(model),
        reasoning_score=float(np.mean(reasoning_ious)) if len(references) > 1 else None,
        reasoning_ious=reasoning_ious if len(references) > 1 else (),
        rule_score=rule_score,
        rule_ious=rule_ious,
    )


@torch.no_grad()
def verify(
    concept: ConceptPrompt,
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput] = (),
    candidates: Sequence[str] = (),
) -> ConceptPrompt:
    """Score a concept on references, for example after its phrases or its rule were edited; also sets its threshold.

    Args:
        concept: The concept.
        model: The model.
        processor: Its processor.
        references: References, each with a mask or boxes.
        negatives: Images without the concept.
        candidates: Further phrases, such as the noun phrases of an edited rule. They replace the phrases of the
            concept, alone or combined with them as in `induce`, if this explains the references better.

    Raises:
        ValueError: If a reference cannot be used, or the concept was made with other weights.
    """
    concept.check_model(model)
    with evaluating(model), loaded(model):
        examples = encode_examples(model, processor, references, negatives)
        tokens, phrases = concept.concept_embeds, concept.phrases
        own = [Candidate(phrase, phrase, tokens) for phrase in phrases] or [Candidate(REFINED, None, tokens)]
        others = [Candidate(phrase, phrase) for phrase in dict.fromkeys(candidates) if phrase not in phrases]
        scored = [decode_candidate(model, processor, candidate, examples) for candidate in (*own, *others)]
        best = combine(scored[: len(own)])
        if others:
            other, other_phrases = select_candidate(scored)
            if other.score > best.score + 1e-6:
                best, phrases, tokens = other, other_phrases, other.candidate.tokens
        rule_score: float | None = None
        rule_ious: tuple[float, ...] = ()
        if concept.rule is not None and len(references) > 1:
            samples = leave_one_out(processor, concept.prompt, references)
            rule_score, rule_ious = verify_rule(model, processor, concept.rule, samples, examples.masks)
    return replace(
        concept,
        phrases=phrases,
        concept_embeds=None if tokens is None else tokens.cpu(),
        score=best.score,
        scores=score_table(
            [best, *(each for each in scored if others and each.candidate.name != best.candidate.name)]
        ),
        threshold=presence_threshold(best, len(examples)),
        model_hash=concept_hash(model),
        reasoning_ious=(),  # of the earlier references
        rule_score=rule_score,
        rule_ious=rule_ious,
    )


def _bar(progress: bool | ProgressFunction, total: int, unit: str, desc: str) -> Any:
    """Return a progress bar, an object that reports to a function instead, or None without progress."""
    if callable(progress):
        return ProgressCalls(total, unit, progress)
    return progress_bar(total, unit, desc) if progress else None


def _propose(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    prompt: str,
    references: Sequence[Reference],
    samples: Sequence[PreparedSample],
    examples: Examples,
    num_samples: int,
    seed: int,
    progress: bool | ProgressFunction,
) -> tuple[list[Written], list[RawSegmentation], list[Scored]]:
    """Complete the prompt for the references as targets, in two rounds.

    Args:
        model: The model.
        processor: Its processor.
        prompt: The user's prompt.
        references: The references.
        samples: The result of `leave_one_out`, for the first round.
        examples: The encoded references.
        num_samples: Completions for each of `samples`.
        seed: Random seed of sampling.
        progress: See `induce`.

    Returns:
        Answers and rules, the outputs of the greedy completions of `samples`, and the phrases that were decoded to
        choose the examples of the second round. The masks of that round do not count, since the references mark their
        own targets.
    """
    num_shown = min(len(references), NUM_EXAMPLES)
    total = len(samples) * num_samples + (num_shown if len(references) > 1 else 0)
    bar = _bar(progress, total, "completions", "induce")
    written, greedy = _complete(model, processor, samples, num_samples, seed, bar)
    shown: Sequence[int] = range(num_shown)
    decoded: list[Scored] = []
    if len(references) > num_shown:
        decoded = _score(model, processor, candidate_phrases(prompt, written), examples)
        best, _ = select_candidate(decoded)
        shown = best_indices(best.ious, num_shown)
    as_applied = with_all_references(processor, prompt, [references[i] for i in shown])
    completed, _ = _complete(model, processor, as_applied, 1, seed, bar)
    if bar is not None:
        bar.close()
    written += [each._replace(reference=shown[each.reference]) for each in completed]
    return written, greedy, decoded


def _score(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrases: Mapping[str, frozenset[int] | None],
    examples: Examples,
    decoded: Sequence[Scored] = (),
) -> list[Scored]:
    """Decode phrases, given with the references that they come from, on all references.

    Those in `decoded` are not decoded again; they may come from more references than before.
    """
    known = {each.candidate.phrase: each for each in decoded}
    scored = []
    for phrase, sources in phrases.items():
        candidate = Candidate(phrase, phrase, sources=sources)
        if phrase in known:
            scored.append(known[phrase].with_candidate(candidate))
        else:
            scored.append(decode_candidate(model, processor, candidate, examples))
    return scored


def _complete(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[PreparedSample],
    num_samples: int,
    seed: int,
    bar: Any,
) -> tuple[list[Written], list[RawSegmentation]]:
    """Complete the prompt for each sample.

    Args:
        model: The model.
        processor: Its processor.
        samples: Samples with references as targets.
        num_samples: Completions per sample: one greedy, the others sampled.
        seed: Random seed of sampling.
        bar: Progress bar that counts completions, or None.

    Returns:
        Answers and rules with the number of their sample, and the outputs of the greedy completions.
    """
    written: list[Written] = []
    greedy = []
    segmenters = [
        Segmenter(model, processor, SegmentSettings(ShortcutRouter("full_reasoning"), config))
        for config in (None, _SAMPLING)
    ]
    for number, sample in enumerate(samples):
        for repetition in range(num_samples):
            if repetition:
                torch.manual_seed(seed * 1_000_003 + number * num_samples + repetition)
            (output,) = segmenters[repetition > 0].segment([sample])
            completion = output.completion
            if completion is not None:
                written.append(Written(number, completion.answer, completion.rule))
            if not repetition:
                greedy.append(output)
            if bar is not None:
                bar.update()
    return written, greedy


def _refine(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    examples: Examples,
    seed: int,
    progress: bool | ProgressFunction,
) -> Scored:
    """Tune tokens that precede a phrase, and score them on references that they were not tuned on (two folds)."""
    count = len(examples)
    folds = [list(range(start, count, 2)) for start in range(2)]
    bar = _bar(progress, 3 * _REFINE_STEPS, "steps", "refine")
    ious = [0.0] * count
    best_step = []
    for fold in folds:
        others = [i for i in range(count) if i not in fold]
        _, step, held_out = _tune(model, processor, phrase, examples, others, fold, seed, _REFINE_STEPS, bar)
        best_step.append(step)
        for i, iou in zip(fold, held_out, strict=True):
            ious[i] = iou
    steps = max(1, round(float(np.mean(best_step))))
    tokens, _, _ = _tune(model, processor, phrase, examples, list(range(count)), [], seed, steps, bar)
    if bar is not None:
        bar.close()
    final = decode_candidate(model, processor, Candidate(REFINED, phrase, tokens), examples)
    return replace(final, ious=tuple(ious))


def _tune(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    examples: Examples,
    tuned_on: list[int],
    held_out: list[int],
    seed: int,
    steps: int,
    bar: Any,
) -> tuple[Tensor, int, list[float]]:
    """Tune tokens on some references; with held-out ones, stop early.

    Returns:
        The tokens (L, D), the number of steps after which they were best, and their IoU on the held-out references.
    """
    width = model.config.ctm_config.sam_hidden_size
    device = execution_device(model.sam)
    generator = torch.Generator().manual_seed(seed)
    scale = 0.02
    tokens = (scale * torch.randn(_REFINED_TOKENS, width, generator=generator)).to(device).requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=_REFINE_RATE)
    features = examples.features.select(torch.tensor(tuned_on))
    ids, mask = processor.sam_text([phrase] * len(tuned_on))
    best = (-1.0, 0, tokens.detach().clone(), [0.0] * len(held_out))
    for step in range(1, steps + 1):
        with torch.enable_grad():
            logits, presence = model.decode_masks(
                features, ids, mask, tokens[None].expand(len(tuned_on), -1, -1)
            )
            losses = [
                segmentation_loss(
                    logits[row : row + 1], torch.from_numpy(examples.masks[i])[None].to(device)
                )[0]
                for row, i in enumerate(tuned_on)
            ]
            missed = torch.nn.functional.softplus(-presence.float()).mean()
            loss = torch.stack(losses).mean() + 0.1 * missed
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bar is not None:
            bar.update()
        if held_out and (step % 5 == 0 or step == steps):
            part = Examples(
                examples.features.select(torch.tensor(held_out)), tuple(examples.masks[i] for i in held_out)
            )
            ious = list(
                decode_candidate(model, processor, Candidate(REFINED, phrase, tokens.detach()), part).ious
            )
            if (score := float(np.mean(ious))) > best[0]:
                best = (score, step, tokens.detach().clone(), ious)
    if not held_out:
        return tokens.detach(), steps, []
    return best[2], best[1], best[3]


__all__ = ["REFINED", "induce", "verify"]
