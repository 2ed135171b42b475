"""One benchmark sample segmented and compared with its truth: a record of plain values.

A record holds JSON values only:

- `sample_id`, `dataset`, `split`, `level`, `group`, `family`, `prompt`: the sample's, as in `ConceptSample`.
- `present`, `gt_box`, `gt_answer`, `gt_rule`, `gt_think`: its truth; `present` is None where it is unreadable.
- `route`, `presence`, `threshold`, `decode_presence`, `score`, `label`, `completion`, `think`, `rule`, `answer`, `box`,
  `check`, `check_reference`, `check_iou`, `error`: the result's, as in `ConceptSegmentation`.
- `mask`: the predicted mask, encoded by `rle.encode_mask`, at the size of the image; None where the sample failed.
- `scores`: what `MaskMetrics` needs of the image under the protocol; None where the truth is a box only.
- `foreground_iou`: under the protocol, a failed sample like an empty mask; None where the truth is a box only.
- `rejected`: whether `decode_presence` is below 0.5.
- `box_iou`, `format_valid`: of the completion; None on the shortcut. A missing box counts 0.
- `route_ious`, `routing_regret`: the foreground IoU of both routes, and by how much the better one exceeds the one that
  was taken; None where that was not asked for, or could not be measured.

A record of a sample that has candidates also holds `stratum`, `chosen` and `sibling_fraction` (see `choice`).

Fields that only some records have: `mask_resized_from` and `mask_refused`, (width, height) of a true mask that is
stored at another size than its image; `reference_faults` and `references_lost`, as in `ConceptSample`. An evaluation
adds `files`, a hash of the sample's files, where it has files (see `samples`); a report adds `judgement` where there
are judgements (see `decomposition`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...completion import parse_completion
from ...data import ConceptSample, UnreadableSampleError
from ...inputs import PreparedSample
from ...modeling_conceptseg import ConceptSegForSegmentation
from ...outputs import ConceptSegmentation
from ...processing_conceptseg import ConceptSegProcessor
from ...references import Reference
from ...router import ShortcutRouter
from ..metrics import METRICS, MaskMetrics, box_iou, get_protocol
from .choice import choice_values
from .rle import encode_mask

# Below this presence of the final decode the model says: it is not there.
REJECTION_THRESHOLD = 0.5

# Grows when records come to hold other things: older ones are then not mixed with newer ones.
RECORD_FORMAT = 2

RECORD_FIELDS = frozenset(
    """
    sample_id dataset split level group family prompt present route presence threshold decode_presence rejected
    foreground_iou scores score label answer gt_answer think gt_think rule gt_rule completion format_valid box
    gt_box box_iou check check_reference check_iou route_ious routing_regret error mask
    """.split()
)
"""The fields that every record has."""


def shown_references(sample: ConceptSample, max_references: int | None = None) -> list[Reference]:
    """The references that the model is shown.

    Args:
        sample: The sample.
        max_references: At most so many of a CI or CD sample, its first; 1 is the paper's 1x1 (Table 12). A CR sample
            keeps its own, which are part of what is asked.
    """
    return sample.references if sample.level == "CR" else sample.references[:max_references]


def segment_samples(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[ConceptSample],
    router: str | ShortcutRouter = "adaptive",
    generation_config: Any = None,
    sam_prompt: str = "concept+text",
    max_references: int | None = None,
    protocol: str = "standard",
) -> list[ConceptSegmentation]:
    """Segments benchmark samples in one batch; a sample that cannot be prepared gives a failed result.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples.
        router: See `ConceptSegForSegmentation.segment`.
        generation_config: See there.
        sam_prompt: See there.
        max_references: See `shown_references`.
        protocol: See `protocols`; one that compares data sets at their own size has SAM 3's image and mask resized as
            the released code does for these.
    """
    own_size = get_protocol(protocol).own_size
    if apart := [index for index, sample in enumerate(samples) if sample.dataset in own_size]:
        options = (router, generation_config, sam_prompt, max_references)
        resizing = processor.with_settings(
            sam_resampling="bicubic", mask_resampling="bicubic", shortcut_size=None
        )
        others = [index for index in range(len(samples)) if index not in set(apart)]
        found: dict[int, ConceptSegmentation] = {}
        for chosen, chosen_processor in ((apart, resizing), (others, processor)):
            batch = [samples[index] for index in chosen]
            results = segment_samples(model, chosen_processor, batch, *options) if batch else []
            found |= dict(zip(chosen, results, strict=True))
        return [found[index] for index in range(len(samples))]
    prepared = []
    for sample in samples:
        try:
            # SAM 3 alone sees no references: a bad one is no reason to fail.
            references = [] if router == "sam_only" else shown_references(sample, max_references)
            prepared.append(processor.prepare(sample.image, sample.prompt, references, lazy=True))
        except (ValueError, OSError) as error:
            prepared.append(PreparedSample.failed(sample.prompt, str(error)))
    return model.segment(
        prepared,
        processor=processor,
        router=router,
        generation_config=generation_config,
        sam_prompt=sam_prompt,
        return_logits=True,
    )


def segment_other_routes(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[ConceptSample],
    results: Sequence[ConceptSegmentation],
    *options: Any,
) -> list[ConceptSegmentation | None]:
    """Segments each sample by the route that it did not take; None for a sample that took none.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples.
        results: Their results.
        *options: As of `segment_samples`, from `generation_config` on.
    """
    others: list[ConceptSegmentation | None] = [None] * len(samples)
    for taken, router in (("shortcut", "full_reasoning"), ("reasoning", "sam_only")):
        indices = [index for index, result in enumerate(results) if result.route == taken]
        if indices:
            chosen = [samples[index] for index in indices]
            found = segment_samples(model, processor, chosen, router, *options)
            for index, result in zip(indices, found, strict=True):
                others[index] = result
    return others


def make_record(
    sample: ConceptSample,
    result: ConceptSegmentation,
    protocol: str = "standard",
    metrics: Sequence[str] = METRICS,
    other: ConceptSegmentation | None = None,
) -> dict[str, Any]:
    """Compares a result with the truth.

    Args:
        sample: The sample.
        result: What the model made of it; a failed result counts as an empty mask.
        protocol: See `protocols`.
        metrics: See `MaskMetrics`.
        other: What the route that was not taken makes of it, where routing regret is asked for.

    Returns:
        The record; see above.
    """
    scores, iou, route_ious, regret = None, None, None, None
    if not sample.box_only:
        scores, iou = _score(sample, result, protocol, metrics)
        if other is not None and result.route is not None:
            # In this order in every record, whichever was taken.
            _, other_iou = _score(sample, other, protocol, ())
            ious = {result.route: iou}
            route_ious = {route: ious.get(route, other_iou) for route in ("shortcut", "reasoning")}
            regret = max(route_ious.values()) - iou
    reasoned = result.route == "reasoning"
    found_box = None
    mask = None if result.mask is None else np.asarray(result.mask) >= 128
    if reasoned and sample.box is not None:
        found_box = 0.0 if result.box is None else box_iou(result.box, sample.box)
    return {
        "sample_id": sample.sample_id,
        "dataset": sample.dataset,
        "split": sample.split,
        "level": sample.level,
        "group": sample.group,
        "family": sample.family,
        "prompt": sample.prompt,
        "present": sample.present,
        "route": result.route,
        "presence": result.presence,
        "threshold": result.threshold,
        "decode_presence": result.decode_presence,
        "rejected": result.decode_presence is not None and result.decode_presence < REJECTION_THRESHOLD,
        "foreground_iou": iou,
        "scores": scores,
        "score": result.score,
        "label": result.label,
        "answer": result.answer,
        "gt_answer": sample.answer,
        "think": result.think,
        "gt_think": sample.think,
        "rule": result.rule,
        "gt_rule": sample.rule,
        "completion": result.completion,
        "format_valid": parse_completion(result.completion or "").is_valid if reasoned else None,
        "box": None if result.box is None else list(result.box),
        "gt_box": None if sample.box is None else list(sample.box),
        "box_iou": found_box,
        "check": None if result.check is None else list(result.check),
        "check_reference": result.check_reference,
        "check_iou": result.check_iou,
        "route_ious": route_ious,
        "routing_regret": regret,
        "error": result.error,
        "mask": None if mask is None else encode_mask(mask),
        **choice_values(
            sample, np.zeros(np.asarray(sample.mask).shape, dtype=bool) if mask is None else mask
        ),
        **_notes(sample),
    }


def make_error_record(
    error: UnreadableSampleError, protocol: str = "standard", metrics: Sequence[str] = METRICS
) -> dict[str, Any]:
    """The record of a sample that cannot be read.

    With a readable truth it counts as an empty prediction; without one it has no scores and `present` is None.

    Args:
        error: What is known of the sample, and why it cannot be read.
        protocol: See `protocols`.
        metrics: See `MaskMetrics`.
    """
    ground_truth = error.ground_truth or {"mask": Image.new("L", (1, 1)), "box": None, "box_only": True}
    sample = ConceptSample(image=Image.new("RGB", ground_truth["mask"].size), **error.fields, **ground_truth)
    result = ConceptSegmentation.failed(str(error), sample.prompt)
    record = make_record(sample, result, protocol, metrics)
    if error.stretched is not None:
        notes = _notes(error.stretched)
        record |= notes | {"mask_refused": notes.pop("mask_resized_from")}
    return record if error.ground_truth is not None else record | {"present": None, "rejected": None}


def _notes(sample: ConceptSample) -> dict[str, Any]:
    """What is said of a sample only where there is something to say."""
    notes: dict[str, Any] = {}
    if sample.stored_mask is not None:
        notes["mask_resized_from"] = list(sample.stored_mask.size)
    if sample.reference_faults:
        notes["reference_faults"] = list(sample.reference_faults)
        notes["references_lost"] = sample.references_lost
    return notes


def _score(
    sample: ConceptSample, result: ConceptSegmentation, protocol: str, metrics: Sequence[str]
) -> tuple[dict[str, float], float]:
    """What `MaskMetrics` needs of the image, and the foreground IoU."""
    rule = get_protocol(protocol)
    own_size = sample.dataset in rule.own_size
    ignore = sample.ignore if rule.ignores or own_size else None
    mask: Image.Image | np.ndarray = Image.new("L", sample.mask.size) if result.mask is None else result.mask
    ground_truth = sample.mask
    if ignore is None and not own_size and rule.size is not None:
        if result.mask_logits is not None:
            mask = rule.threshold(result.mask_logits)
            ground_truth = sample.stored_mask or sample.mask  # resized once only, as a mask of any size is
        if rule.bicubic_ground_truths:
            ground_truth = sample.soft_mask or sample.stored_mask or sample.mask
    scores = MaskMetrics(protocol, metrics=metrics).update(mask, ground_truth, ignore, own_size)
    union = scores["tp"] + scores["fp"] + scores["fn"]
    return scores, scores["tp"] / union if union else 1.0
