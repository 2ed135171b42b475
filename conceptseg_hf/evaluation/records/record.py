"""Records: the result of a benchmark sample and its comparison with the ground truth, as plain values.

A record holds JSON values only:

- `sample_id`, `dataset`, `split`, `level`, `group`, `family`, `prompt`: of the sample, as in `ConceptSample`.
- `present`, `gt_box`, `gt_answer`, `gt_rule`, `gt_think`: the ground truth; `present` is None if it is unreadable.
- `route`, `presence`, `threshold`, `decode_presence`, `score`, `label`, `completion`, `think`, `rule`, `answer`, `box`,
  `check`, `check_reference`, `check_iou`, `error`: of the result, as in `ConceptSegmentation`.
- `mask`: the predicted mask, encoded by `rle.encode_mask`, at the size of the image; None if the sample failed.
- `scores`: the image's entry of `MaskMetrics` under the protocol; None if the ground truth is only a box.
- `foreground_iou`: under the protocol, with an empty mask if the sample failed; None if the ground truth is only a box.
- `rejected`: whether `decode_presence` is below 0.5.
- `box_iou`, `format_valid`: of the completion; None on the shortcut. A missing box counts as 0.
- `route_ious`, `routing_regret`: the foreground IoU of both routes, and the IoU of the better one minus that of the
  route taken; None if it was not requested or could not be computed.

Records of samples with candidates also hold `stratum`, `chosen` and `sibling_fraction` (see `choice`). Records of CoPRS
also hold `prior` (see `prior`).

Optional fields: `mask_resized_from` and `mask_refused`, the (width, height) of a ground truth mask that is stored at
another size than its image; `reference_faults` and `references_lost`, as in `ConceptSample`. An evaluation adds
`files`, a hash of the sample's files, for samples read from files (see `samples`); a report with judgements adds
`judgement` (see `decomposition`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...completion import parse_completion
from ...concept_prompt import ConceptPrompt
from ...coprs.completion import parse_reasoning
from ...data import ConceptSample, UnreadableSampleError
from ...inputs import PreparedSample
from ...modeling_conceptseg import ConceptSegForSegmentation
from ...outputs import ConceptSegmentation
from ...processing_conceptseg import ConceptSegProcessor
from ...references import Reference
from ...router import ShortcutRouter
from ..metrics import METRICS, MaskMetrics, box_iou, get_protocol
from .choice import choice_values
from .prior import prior_values
from .rle import encode_mask

# If the final decode has a presence below this value, the model rejects the concept as absent.
REJECTION_THRESHOLD = 0.5

# Incremented when the content of records changes, so that records of different formats are not mixed.
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
    """Return the references that the model is given.

    Args:
        sample: The sample.
        max_references: Maximum number of references of a CI or CD sample, which keeps the first ones; 1 is the paper's
            1x1 (Table 12). A CR sample keeps all of its references, which are part of the task.
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
    concept: ConceptPrompt | None = None,
) -> list[ConceptSegmentation]:
    """Segment benchmark samples in one batch; a sample that cannot be prepared gets a failed result.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples.
        router: See `ConceptSegForSegmentation.segment`.
        generation_config: See `ConceptSegForSegmentation.segment`.
        sam_prompt: See `ConceptSegForSegmentation.segment`.
        max_references: See `shown_references`.
        protocol: See `protocols`. For the datasets in `Protocol.own_size`, SAM 3's image and mask are resized as in the
            released code.
        concept: See `ConceptSegForSegmentation.segment`.
    """
    own_size = get_protocol(protocol).own_size
    if own_size_indices := [index for index, sample in enumerate(samples) if sample.dataset in own_size]:
        options = (router, generation_config, sam_prompt, max_references)
        bicubic_processor = processor.with_settings(
            sam_resampling="bicubic", mask_resampling="bicubic", shortcut_size=None
        )
        other_indices = [index for index in range(len(samples)) if index not in set(own_size_indices)]
        results_by_index: dict[int, ConceptSegmentation] = {}
        for indices, batch_processor in ((own_size_indices, bicubic_processor), (other_indices, processor)):
            batch = [samples[index] for index in indices]
            results = (
                segment_samples(model, batch_processor, batch, *options, concept=concept) if batch else []
            )
            results_by_index |= dict(zip(indices, results, strict=True))
        return [results_by_index[index] for index in range(len(samples))]
    prepared = []
    for sample in samples:
        try:
            # SAM 3 alone does not use references, so an invalid reference must not fail the sample.
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
        concept=concept,
    )


def segment_other_routes(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[ConceptSample],
    results: Sequence[ConceptSegmentation],
    *options: Any,
) -> list[ConceptSegmentation | None]:
    """Segment each sample by the route that it did not take; None for a sample that took neither route.

    Args:
        model: The model.
        processor: Its processor.
        samples: The samples.
        results: Their results.
        *options: Positional arguments of `segment_samples`, from `generation_config` on.
    """
    other_results: list[ConceptSegmentation | None] = [None] * len(samples)
    for taken, router in (("shortcut", "full_reasoning"), ("reasoning", "sam_only")):
        indices = [index for index, result in enumerate(results) if result.route == taken]
        if indices:
            batch = [samples[index] for index in indices]
            batch_results = segment_samples(model, processor, batch, router, *options)
            for index, result in zip(indices, batch_results, strict=True):
                other_results[index] = result
    return other_results


def make_record(
    sample: ConceptSample,
    result: ConceptSegmentation,
    protocol: str = "standard",
    metrics: Sequence[str] = METRICS,
    other: ConceptSegmentation | None = None,
    has_prior: bool = False,
) -> dict[str, Any]:
    """Compare a result with the ground truth.

    Args:
        sample: The sample.
        result: The result of the model; a failed result counts as an empty mask.
        protocol: See `protocols`.
        metrics: See `MaskMetrics`.
        other: The result of the route that was not taken, if routing regret is requested.
        has_prior: Whether the result is that of CoPRS: its heatmap is a positional prior, and its completion has
            another format.

    Returns:
        The record; its fields are listed in the docstring of the module.
    """
    scores, iou, route_ious, regret = None, None, None, None
    if not sample.box_only:
        scores, iou = _score(sample, result, protocol, metrics)
        if other is not None and result.route is not None:
            # All records have the same order of keys, whichever route was taken.
            _, other_iou = _score(sample, other, protocol, ())
            ious = {result.route: iou}
            route_ious = {route: ious.get(route, other_iou) for route in ("shortcut", "reasoning")}
            regret = max(route_ious.values()) - iou
    reasoned = result.route in ("rule", "reasoning")
    completion_box_iou = format_valid = None
    if reasoned:
        parse = parse_reasoning if has_prior else parse_completion
        format_valid = parse(result.completion or "").is_valid
    mask = None if result.mask is None else np.asarray(result.mask) >= 128
    if reasoned and sample.box is not None and not has_prior:
        completion_box_iou = 0.0 if result.box is None else box_iou(result.box, sample.box)
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
        "format_valid": format_valid,
        "box": None if result.box is None else list(result.box),
        "gt_box": None if sample.box is None else list(sample.box),
        "box_iou": completion_box_iou,
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
        **(prior_values(sample, result) if has_prior else {}),
        **_notes(sample),
    }


def make_error_record(
    error: UnreadableSampleError, protocol: str = "standard", metrics: Sequence[str] = METRICS
) -> dict[str, Any]:
    """Return the record of a sample that cannot be read.

    If its ground truth is readable, it counts as an empty prediction; otherwise it has no scores and `present` is None.

    Args:
        error: The error, with the known fields of the sample.
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
    """Return the optional fields of a sample's record."""
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
    """Return the image's entry of `MaskMetrics`, and the foreground IoU."""
    settings = get_protocol(protocol)
    own_size = sample.dataset in settings.own_size
    ignore = sample.ignore if settings.ignores or own_size else None
    mask: Image.Image | np.ndarray = Image.new("L", sample.mask.size) if result.mask is None else result.mask
    ground_truth = sample.mask
    if ignore is None and not own_size and settings.size is not None:
        if result.mask_logits is not None:
            mask = settings.threshold(result.mask_logits)
            ground_truth = sample.stored_mask or sample.mask  # avoids resizing the mask twice
        if settings.bicubic_ground_truths:
            ground_truth = sample.soft_mask or sample.stored_mask or sample.mask
    scores = MaskMetrics(protocol, metrics=metrics).update(mask, ground_truth, ignore, own_size)
    union = scores["tp"] + scores["fp"] + scores["fn"]
    return scores, scores["tp"] / union if union else 1.0
