"""Candidate prompts of a concept: how well each explains the references, and which one is selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .boxes import foreground_iou
from .concept_prompt import CandidateScore
from .devices import execution_device
from .images import ImageInput, load_image, load_mask
from .modeling_conceptseg import ConceptSegForSegmentation
from .postprocessing import post_process_mask
from .processing_conceptseg import ConceptSegProcessor
from .references import Reference, load_references
from .sam_prompt import ImageFeatures

T = TypeVar("T")

_MAX_PHRASES = 3  # phrases that are kept together
_BATCH = 16  # images that are encoded or decoded together
_TIE = 0.02  # scores on few references that differ less than this do not rank candidates


@dataclass(frozen=True)
class Examples:
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
class Candidate:
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

    def counted(self, num_references: int) -> tuple[bool, ...]:
        """Return for each reference whether it counts: a phrase must not come from this reference alone."""
        return tuple(self.sources is None or self.sources != {number} for number in range(num_references))


@dataclass(frozen=True)
class Scored:
    """Result of decoding a candidate on all examples.

    Attributes:
        candidate: The candidate.
        ious: IoU on each reference.
        presences: Presence in each reference, then in each negative.
        counted: References that count for the score: those that the candidate does not come from alone. A phrase that
            only names the object of one image would otherwise look like a concept.
    """

    candidate: Candidate
    ious: tuple[float, ...]
    presences: tuple[float, ...]
    counted: tuple[bool, ...]

    @property
    def score(self) -> float:
        """Mean IoU on the references that count."""
        counted = [iou for iou, counts in zip(self.ious, self.counted, strict=True) if counts]
        return float(np.mean(counted or self.ious))

    def with_candidate(self, candidate: Candidate) -> Scored:
        """Return the result for a candidate with the same prompt that comes from other references."""
        return replace(self, candidate=candidate, counted=candidate.counted(len(self.ious)))


def encode_examples(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    references: Sequence[Reference],
    negatives: Sequence[ImageInput],
) -> Examples:
    """Encode references and negatives with SAM 3.

    Raises:
        ValueError: If a reference has neither mask nor box, or an image cannot be used.
    """
    if not references:
        raise ValueError("induce: there are no references; give at least one with a mask or a box.")
    read = load_references(references)
    masks = []
    for number, (reference, (image, boxes)) in enumerate(zip(references, read, strict=True)):
        if not boxes:
            raise ValueError(
                f"induce: reference {number} has neither a mask nor a box; mark the concept in it."
            )
        masks.append(_mask_of(reference, image.size, boxes))
    images = [*(image for image, _ in read), *map(load_image, negatives)]
    device = execution_device(model.sam)
    parts = [
        model.encode_image(torch.stack([processor.sam_pixels(image) for image in part]).to(device))
        for part in _batches(images)
    ]
    return Examples(ImageFeatures.concatenate(parts), tuple(masks))


def _mask_of(reference: Reference, size: tuple[int, int], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the mask of a reference, (H, W) bool; boxes without a mask are filled."""
    if reference.mask is not None:
        return load_mask(reference.mask, size)
    mask = np.zeros(size[::-1], dtype=bool)
    for x1, y1, x2, y2 in boxes:
        mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
    return mask


def decode_candidate(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    candidate: Candidate,
    examples: Examples,
    tokens: Tensor | None = None,
) -> Scored:
    """Decode a candidate on all references and negatives.

    Args:
        model: The model.
        processor: Its processor.
        candidate: The candidate.
        examples: N references and negatives.
        tokens: (N, L, D) tokens that replace those of the candidate, one set for each image.
    """
    if tokens is None and candidate.tokens is not None:
        tokens = candidate.tokens[None].expand(len(examples.features), -1, -1)
    logits: list[Tensor] = []
    presences: list[float] = []
    for rows in _batches(range(len(examples.features))):
        ids = mask = None
        if candidate.phrase is not None:
            ids, mask = processor.sam_text([candidate.phrase] * len(rows))
        features = examples.features.select(torch.tensor(list(rows)))
        row_tokens = None if tokens is None else tokens[rows[0] : rows[-1] + 1]
        batch_logits, presence = model.decode_masks(features, ids, mask, row_tokens)
        logits += [row[0] for row in batch_logits]
        presences += presence.float().sigmoid()[:, 0].tolist()
    predictions = [
        np.asarray(post_process_mask(row, target.shape[::-1], processor.mask_resampling)[0]) > 0
        for row, target in zip(logits, examples.masks)
    ]
    ious = tuple(
        float(foreground_iou(prediction, target))
        for prediction, target in zip(predictions, examples.masks, strict=True)
    )
    return Scored(candidate, ious, tuple(presences), candidate.counted(len(examples)))


def decode_mean_tokens(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    name: str,
    phrase: str,
    tokens: Tensor,
    examples: Examples,
) -> Scored:
    """Decode the mean of the concept tokens of all references; each reference is scored without its own tokens.

    Tokens of a reference contain the position of its target.

    Args:
        model: The model.
        processor: Its processor.
        name: Name of the candidate.
        phrase: The phrase that follows the tokens.
        tokens: (N, L2, D) concept tokens of completions with the N >= 2 references as targets.
        examples: The references and negatives.
    """
    mean = tokens.mean(dim=0)
    others = (tokens.sum(dim=0) - tokens) / (len(tokens) - 1)
    num_negatives = len(examples.features) - len(tokens)
    rows = torch.cat([others, mean.expand(num_negatives, -1, -1)])
    return decode_candidate(model, processor, Candidate(name, phrase, mean), examples, rows)


def _batches(items: Sequence[T]) -> list[Sequence[T]]:
    """Divide items into batches that SAM 3 processes together."""
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]


def combine(scored: Sequence[Scored]) -> Scored:
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
    return Scored(
        candidate,
        tuple(scored[choice[i]].ious[i] for i in range(count)),
        tuple(float(allowed[choice[i], i]) for i in range(presences.shape[1])),
        tuple(any(column) for column in zip(*(each.counted for each in scored), strict=True)),
    )


def select_candidate(scored: Sequence[Scored]) -> tuple[Scored, tuple[str, ...]]:
    """Return the best candidate, or a combination of phrases that is clearly better, and its phrases.

    Of several candidates that are about as good as the one with the highest score, the simplest is selected: it is less
    likely to be best by coincidence.
    """
    ranked = sorted(scored, key=lambda each: -each.score)
    highest = ranked[0].score
    best = min((each for each in ranked if _lead(ranked[0], each) <= _TIE), key=_complexity)
    selected = [best]
    phrases = [each for each in ranked if each.candidate.tokens is None]
    for count in range(2, min(_MAX_PHRASES, len(phrases)) + 1):
        combined = combine(phrases[:count])
        if combined.score > highest + _TIE:
            best, selected, highest = combined, phrases[:count], combined.score
    return best, tuple(each.candidate.phrase for each in selected if each.candidate.phrase is not None)


def _lead(first: Scored, second: Scored) -> float:
    """Return the mean difference of two candidates on the references that count for both."""
    shared = [a and b for a, b in zip(first.counted, second.counted, strict=True)]
    differences = [a - b for a, b, use in zip(first.ious, second.ious, shared, strict=True) if use]
    return float(np.mean(differences)) if differences else first.score - second.score


def _complexity(scored: Scored) -> tuple[bool, bool, int, int, float]:
    """Return a key that sorts simple candidates first.

    Phrases are simpler than tokens, phrases that come from no reference in particular or from many of them simpler than
    those from few, and short phrases simpler than long ones.
    """
    candidate = scored.candidate
    sources = candidate.sources
    num_words = len((candidate.phrase or "").split())
    return candidate.tokens is not None, sources is not None, -len(sources or ()), num_words, -scored.score


def presence_threshold(best: Scored, num_references: int) -> float:
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


def score_table(scored: Sequence[Scored]) -> tuple[CandidateScore, ...]:
    """Return the scores of all candidates: the first one, and the others with the best one first."""
    first, *others = scored
    ranked = [first, *sorted(others, key=lambda each: -each.score)]
    return tuple(CandidateScore(each.candidate.name, each.score, each.ious) for each in ranked)
