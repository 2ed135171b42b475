"""Verification of rules: how well the VLM segments the references if it is given a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .boxes import foreground_iou
from .concept_prompt import NUM_EXAMPLES
from .inputs import PreparedSample
from .modeling_conceptseg import ConceptSegForSegmentation
from .outputs import ConceptSegmentation
from .phrases import Written
from .processing_conceptseg import ConceptSegProcessor
from .references import Reference

_MAX_WRITTEN_RULES = 2
_BATCH = 16  # references that are segmented together


def leave_one_out(
    processor: ConceptSegProcessor, prompt: str, references: Sequence[Reference]
) -> list[PreparedSample]:
    """Return a sample for each reference as the target, with others as examples.

    With more than five references, each target has the four that follow it, so that all references are examples.
    """
    count = len(references)
    samples = []
    for number, target in enumerate(references):
        following = sorted((number + i) % count for i in range(1, min(count, NUM_EXAMPLES + 1)))
        others = [references[i] for i in following] or [target]
        samples.append(processor.prepare(target.image, prompt, others))
    return samples


def with_all_references(
    processor: ConceptSegProcessor, prompt: str, references: Sequence[Reference]
) -> list[PreparedSample]:
    """Return a sample for each reference as the target, with all references as examples, as for other images.

    For a single reference, the sample would be that of `leave_one_out`, so there is none.
    """
    if len(references) < 2:
        return []
    return [processor.prepare(target.image, prompt, references) for target in references]


def mask_ious(results: Sequence[ConceptSegmentation], masks: Sequence[np.ndarray]) -> tuple[float, ...]:
    """Return the foreground IoU of each result with its (H, W) bool mask; 0 for failed results."""
    return tuple(
        0.0 if result.mask is None else float(foreground_iou(np.asarray(result.mask) > 0, mask))
        for result, mask in zip(results, masks, strict=True)
    )


def verify_rule(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    rule: str,
    samples: Sequence[PreparedSample],
    masks: Sequence[np.ndarray],
    sources: frozenset[int] | None = None,
) -> tuple[float, tuple[float, ...]]:
    """Return the mean IoU of completions that start with a rule, and the IoU on each reference.

    Args:
        model: The model.
        processor: Its processor.
        rule: The rule.
        samples: The result of `leave_one_out`.
        masks: (H, W) bool ground-truth mask of each reference.
        sources: The references that the rule comes from; a rule of a single reference is scored on the others.
    """
    results = model.segment(
        samples, router="full_reasoning", processor=processor, rule=rule, batch_size=_BATCH
    )
    ious = mask_ious(results, masks)
    return float(np.mean([iou for i, iou in enumerate(ious) if sources != {i}] or ious)), ious


def select_rule(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    phrase: str | None,
    sources: frozenset[int] | None,
    written: Sequence[Written],
    samples: Sequence[PreparedSample],
    masks: Sequence[np.ndarray],
) -> tuple[str | None, float | None, tuple[float, ...]]:
    """Return the rule with the highest mean IoU, this IoU, and the IoU on each reference.

    Candidates are the most frequent rules that the VLM wrote, and the phrase of the concept.

    Args:
        model: The model.
        processor: Its processor.
        phrase: The phrase of the concept, or None.
        sources: The references that the phrase comes from; see `verify_rule`.
        written: What the VLM wrote for each reference.
        samples: The result of `leave_one_out`.
        masks: (H, W) bool ground-truth mask of each reference.
    """
    counts = Counter(each.rule for each in written if each.rule and _is_valid(processor, each.rule))
    candidates: dict[str, frozenset[int] | None] = {
        rule: frozenset(each.reference for each in written if each.rule == rule)
        for rule, _ in counts.most_common(_MAX_WRITTEN_RULES)
    }
    if phrase is not None:
        candidates[phrase] = sources
    if len(samples) < 2 or not candidates:  # a rule cannot be verified on the reference that it comes from
        return next(iter(counts), None), None, ()
    scores = {
        rule: verify_rule(model, processor, rule, samples, masks, of) for rule, of in candidates.items()
    }
    best = max(scores, key=lambda rule: scores[rule][0])
    return best, *scores[best]


def _is_valid(processor: ConceptSegProcessor, rule: str) -> bool:
    try:
        processor.check_rule(rule)
    except ValueError:
        return False
    return True
