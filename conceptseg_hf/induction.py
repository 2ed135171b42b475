"""Induction of a concept from references: the VLM proposes phrases, and SAM 3 verifies them on the references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .boxes import foreground_iou
from .concept_prompt import CandidateScore, ConceptPrompt, concept_hash
from .devices import execution_device, loaded
from .images import ImageInput, load_image, load_mask
from .inputs import PreparedSample
from .losses import segmentation_loss
from .modeling_conceptseg import ConceptSegForSegmentation, evaluating
from .phrases import candidate_phrases
from .postprocessing import post_process_mask
from .processing_conceptseg import ConceptSegProcessor
from .progress import ProgressCalls, ProgressFunction, progress_bar
from .references import Reference, resolve_references
from .rules import leave_one_out, mask_ious, select_rule, verify_rule
from .sam_prompt import ImageFeatures

REFINED = "refined tokens"
"""Name of the candidate with tokens that are tuned on the references."""

_MAX_PHRASES = 3  # phrases that are kept together
_SAMPLING = {"do_sample": True, "temperature": 1.0}
_REFINED_TOKENS, _REFINE_STEPS, _REFINE_RATE = 4, 40, 0.05


@dataclass(frozen=True)
class _Examples:
    """References and negatives that SAM 3 has encoded.

    Attributes:
        features: SAM 3 features of the references, then of the negatives.
        masks: (H, W) bool ground-truth mask of each reference.
    """

    features: ImageFeatures
    masks: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class _Candidate:
    """A prompt for SAM 3: a phrase, concept tokens, or both.

    Attributes:
        name: Name in the scores.
        phrase: The phrase, or None.
        tokens: (L, D) concept tokens, or None.
        sources: References that the phrase was induced from; None if it does not come from single references.
    """

    name: str
    phrase: str | None
    tokens: Tensor | None = None
    sources: frozenset[int] | None = None

    def is_independent_of(self, reference: int) -> bool:
        """Whether the phrase does not come from this reference alone."""
        return self.sources is None or self.sources != {reference}


@dataclass(frozen=True)
class _Scored:
    """Result of decoding a candidate on all examples.

    Attributes:
        candidate: The candidate.
        ious: IoU on each reference.
        presences: Presence in each reference, then in each negative.
        counted: References that count for the score: those that the candidate does not come from alone. A phrase that
            only names the object of one image would otherwise look like a concept.
    """

    candidate: _Candidate
    ious: tuple[float, ...]
    presences: tuple[float, ...]
    counted: tuple[bool, ...]

    @property
    def score(self) -> float:
        counted = [iou for iou, counts in zip(self.ious, self.counted, strict=True) if counts]
        return float(np.mean(counted or self.ious))


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

    The VLM completes the prompt for each reference as the target, with the other references as examples. Its answers
    and their words, the noun phrases of its rules, and the user's prompt are candidate phrases. SAM 3
    decodes every candidate on all references; the candidate with the highest mean IoU is selected. A phrase that comes
    from a single reference is scored on the others. The rules that the VLM wrote, and the selected phrase, are verified
    by completions that start with them.

    Args:
        model: The model.
        processor: Its processor.
        prompt: The user's prompt.
        references: References, each with a mask or boxes.
        negatives: Images without the concept, which are used for the threshold.
        num_samples: Completions per reference: one greedy, the others sampled.
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
        examples = _encode(model, processor, references, negatives)
        samples = leave_one_out(processor, prompt, references)
        completions, reasoning_ious = _complete(
            model, processor, samples, examples.masks, num_samples, seed, progress
        )
        phrases_by_source = candidate_phrases(prompt, completions, num_samples)
        scored = [
            _decode(model, processor, _Candidate(phrase, phrase, sources=sources), examples)
            for phrase, sources in phrases_by_source.items()
        ]
        if refine and len(examples) > 1:
            best = max(scored, key=lambda each: each.score)
            scored.append(
                _refine(model, processor, best.candidate.phrase or prompt, examples, seed, progress)
            )
        best, phrases = _select(scored)
        rule, rule_score = select_rule(
            model,
            processor,
            phrases[0] if phrases else None,
            phrases_by_source.get(phrases[0]) if phrases else None,
            [rule for _, rule in completions[::num_samples]],
            samples,
            examples.masks,
        )
    return ConceptPrompt(
        prompt=prompt,
        phrases=phrases,
        rule=rule,
        concept_embeds=None if best.candidate.tokens is None else best.candidate.tokens.cpu(),
        threshold=_threshold(best, len(examples)),
        score=best.score,
        scores=_table([best, *(each for each in scored if each is not best)]),
        model_hash=concept_hash(model),
        reasoning_score=float(np.mean(reasoning_ious)) if len(references) > 1 else None,
        reasoning_ious=reasoning_ious if len(references) > 1 else (),
        rule_score=rule_score,
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
        examples = _encode(model, processor, references, negatives)
        tokens, phrases = concept.concept_embeds, concept.phrases
        own = [_Candidate(phrase, phrase, tokens) for phrase in phrases] or [
            _Candidate(REFINED, None, tokens)
        ]
        others = [_Candidate(phrase, phrase) for phrase in dict.fromkeys(candidates) if phrase not in phrases]
        scored = [_decode(model, processor, candidate, examples) for candidate in (*own, *others)]
        best = _combine(scored[: len(own)])
        if others:
            other, other_phrases = _select(scored)
            if other.score > best.score + 1e-6:
                best, phrases, tokens = other, other_phrases, other.candidate.tokens
        rule_score = None
        if concept.rule is not None and len(references) > 1:
            samples = leave_one_out(processor, concept.prompt, references)
            rule_score = verify_rule(model, processor, concept.rule, samples, examples.masks)
    return replace(
        concept,
        phrases=phrases,
        concept_embeds=None if tokens is None else tokens.cpu(),
        score=best.score,
        scores=_table(
            [best, *(each for each in scored if others and each.candidate.name != best.candidate.name)]
        ),
        threshold=_threshold(best, len(examples)),
        model_hash=concept_hash(model),
        reasoning_ious=(),  # of the earlier references
        rule_score=rule_score,
    )


def _bar(progress: bool | ProgressFunction, total: int, unit: str, desc: str) -> Any:
    """Return a progress bar, an object that reports to a function instead, or None without progress."""
    if callable(progress):
        return ProgressCalls(total, unit, progress)
    return progress_bar(total, unit, desc) if progress else None


def _encode(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput],
) -> _Examples:
    """Encode references and negatives with SAM 3.

    Raises:
        ValueError: If a reference has neither mask nor box, or an image cannot be used.
    """
    if not references:
        raise ValueError("induce: there are no references; give at least one with a mask or a box.")
    resolved = resolve_references(references)
    masks = []
    for number, (reference, image, boxes) in enumerate(
        zip(references, resolved.images, resolved.all_boxes, strict=True)
    ):
        if not boxes:
            raise ValueError(
                f"induce: reference {number} has neither a mask nor a box; mark the concept in it."
            )
        masks.append(_mask_of(reference, image.size, boxes))
    images = [*resolved.images, *map(load_image, negatives)]
    device = execution_device(model.sam)
    pixels = torch.stack([processor.sam_pixels(image) for image in images]).to(device)
    return _Examples(model.encode_image(pixels), tuple(masks))


def _mask_of(reference: Reference, size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the mask of a reference, (H, W) bool; boxes without a mask are filled."""
    if reference.mask is not None:
        return load_mask(reference.mask, size)
    mask = np.zeros(size[::-1], dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
    return mask


def _complete(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[PreparedSample],
    masks: Sequence[np.ndarray],
    num_samples: int,
    seed: int,
    progress: bool | ProgressFunction,
) -> tuple[list[tuple[str | None, str | None]], tuple[float, ...]]:
    """Complete the prompt for each reference as the target.

    Returns:
        Answer and rule of each completion, and the IoU of the mask of each greedy completion.
    """
    found: list[tuple[str | None, str | None]] = []
    greedy = []
    bar = _bar(progress, len(samples) * num_samples, "completions", "induce")
    for number, sample in enumerate(samples):
        for repetition in range(num_samples):
            if repetition:
                torch.manual_seed(seed * 1_000_003 + number * num_samples + repetition)
            (result,) = model.segment(
                [sample],
                router="full_reasoning",
                generation_config=_SAMPLING if repetition else None,
                processor=processor,
            )
            found.append((result.answer, result.rule))
            if not repetition:
                greedy.append(result)
            if bar is not None:
                bar.update()
    if bar is not None:
        bar.close()
    return found, mask_ious(greedy, masks)


def _decode(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    candidate: _Candidate,
    examples: _Examples,
) -> _Scored:
    """Decode a candidate on all references and negatives."""
    count = len(examples.features)
    ids = mask = tokens = None
    if candidate.phrase is not None:
        ids, mask = processor.sam_text([candidate.phrase] * count)
    if candidate.tokens is not None:
        tokens = candidate.tokens[None].expand(count, -1, -1)
    logits, presence = model.decode_masks(examples.features, ids, mask, tokens)
    predictions = [
        np.asarray(post_process_mask(row[0], target.shape[::-1], processor.mask_resampling)[0]) > 0
        for row, target in zip(logits, examples.masks)
    ]
    ious = tuple(
        float(foreground_iou(prediction, target))
        for prediction, target in zip(predictions, examples.masks, strict=True)
    )
    counted = tuple(candidate.is_independent_of(i) for i in range(len(examples)))
    return _Scored(candidate, ious, tuple(presence.float().sigmoid()[:, 0].tolist()), counted)


def _combine(scored: Sequence[_Scored]) -> _Scored:
    """Combine candidates: each image uses the one with the highest presence.

    On a reference, a phrase that comes from this reference alone is not used.
    """
    count = len(scored[0].ious)
    presences = np.array([each.presences for each in scored])
    counted = np.array([each.counted for each in scored])
    usable = counted | ~counted.any(axis=0)
    allowed = presences.copy()
    allowed[:, :count][~usable] = -1
    choice = allowed.argmax(axis=0)
    candidate = replace(scored[0].candidate, name=" | ".join(each.candidate.name for each in scored))
    return _Scored(
        candidate,
        tuple(scored[choice[i]].ious[i] for i in range(count)),
        tuple(float(allowed[choice[i], i]) for i in range(presences.shape[1])),
        tuple(any(column) for column in zip(*(each.counted for each in scored), strict=True)),
    )


def _select(scored: Sequence[_Scored]) -> tuple[_Scored, tuple[str, ...]]:
    """Return the best candidate, or the best combination of phrases if it scores higher, and its phrases."""
    ranked = sorted(scored, key=lambda each: -each.score)
    best = ranked[0]
    selected = [best]
    phrases = [each for each in ranked if each.candidate.tokens is None]
    for count in range(2, min(_MAX_PHRASES, len(phrases)) + 1):
        combined = _combine(phrases[:count])
        if combined.score > best.score + 1e-6:
            best, selected = combined, phrases[:count]
    return best, tuple(each.candidate.phrase for each in selected if each.candidate.phrase is not None)


def _threshold(best: _Scored, num_references: int) -> float:
    """Return the presence that separates references from negatives, or half of the lowest one without negatives."""
    positives, negatives = best.presences[:num_references], best.presences[num_references:]
    lowest = min(positives)
    if not negatives:
        return 0.5 * lowest
    highest = max(negatives)
    if highest < lowest:
        return (highest + lowest) / 2
    # Overlapping: the threshold with the highest balanced accuracy.
    candidates = sorted({*positives, *negatives})
    accuracy = [
        np.mean([p >= value for p in positives]) + np.mean([n < value for n in negatives])
        for value in candidates
    ]
    return float(candidates[int(np.argmax(accuracy))])


def _refine(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    examples: _Examples,
    seed: int,
    progress: bool | ProgressFunction,
) -> _Scored:
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
    final = _decode(model, processor, _Candidate(REFINED, phrase, tokens), examples)
    return replace(final, ious=tuple(ious))


def _tune(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str,
    examples: _Examples,
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
            part = _Examples(
                examples.features.select(torch.tensor(held_out)), tuple(examples.masks[i] for i in held_out)
            )
            ious = list(_decode(model, processor, _Candidate(REFINED, phrase, tokens.detach()), part).ious)
            if (score := float(np.mean(ious))) > best[0]:
                best = (score, step, tokens.detach().clone(), ious)
    if not held_out:
        return tokens.detach(), steps, []
    return best[2], best[1], best[3]


def _table(scored: Sequence[_Scored]) -> tuple[CandidateScore, ...]:
    first, *others = scored
    ranked = [first, *sorted(others, key=lambda each: -each.score)]
    return tuple(CandidateScore(each.candidate.name, each.score, each.ious) for each in ranked)


__all__ = ["REFINED", "induce", "verify"]
