"""One benchmark sample segmented and compared with its truth: a record of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..completion import parse_completion
from ..data import ConceptSample, UnreadableSampleError
from ..modeling_conceptseg import ConceptSegForSegmentation
from ..outputs import ConceptSegmentation
from ..processing_conceptseg import ConceptSegInputs, ConceptSegProcessor, PreparedSample
from ..router import ShortcutRouter
from .metrics import METRICS, MaskMetrics, box_iou

# Below this presence of the final decode the model says: it is not there.
REJECTION_THRESHOLD = 0.5


def segment_samples(
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[ConceptSample],
    router: str | ShortcutRouter = "adaptive",
    generation_config: Any = None,
) -> list[ConceptSegmentation]:
    """Segments benchmark samples in one batch; a sample that cannot be prepared gives a failed result."""
    prepared = []
    for sample in samples:
        try:
            prepared.append(processor.prepare(sample.image, sample.prompt, sample.references, lazy=True))
        except (ValueError, OSError) as error:
            prepared.append(PreparedSample.failed(sample.prompt, str(error)))
    return model.segment(
        ConceptSegInputs(prepared, processor), router=router, generation_config=generation_config
    )


def make_record(
    sample: ConceptSample,
    result: ConceptSegmentation,
    protocol: str = "standard",
    metrics: Sequence[str] = METRICS,
) -> dict[str, Any]:
    """Compares a result with the truth.

    Args:
        sample: The sample.
        result: What the model made of it; a failed result counts as an empty mask.
        protocol: See `protocols`.
        metrics: See `MaskMetrics`.

    Returns:
        JSON values only. Among them `scores` (what `MaskMetrics` needs of the image) and `foreground_iou`, under
        the protocol, None where the truth is a box only; `box_iou` and `format_valid` where the MLLM was asked
        (None on the shortcut; a missing box counts 0), and `rejected`: the presence of the final decode is below
        0.5.
    """
    scores, iou = None, None
    if not sample.box_only:
        mask = Image.new("L", sample.mask.size) if result.mask is None else result.mask
        scores = MaskMetrics(protocol, metrics=metrics).update(mask, sample.mask, sample.ignore)
        union = scores["tp"] + scores["fp"] + scores["fn"]
        iou = scores["tp"] / union if union else 1.0
    reasoned = result.route == "reasoning"
    found_box = None
    if reasoned and sample.box is not None:
        found_box = 0.0 if result.box is None else box_iou(result.box, sample.box)
    return {
        "sample_id": sample.sample_id,
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
        "true_answer": sample.answer,
        "rule": result.rule,
        "true_rule": sample.rule,
        "completion": result.completion,
        "format_valid": parse_completion(result.completion).is_valid if reasoned else None,
        "box": None if result.box is None else list(result.box),
        "true_box": None if sample.box is None else list(sample.box),
        "box_iou": found_box,
        "check": None if result.check is None else list(result.check),
        "check_reference": result.check_reference,
        "check_iou": result.check_iou,
        "error": result.error,
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
    truth = error.truth or {"mask": Image.new("L", (1, 1)), "box": None, "box_only": True}
    sample = ConceptSample(image=Image.new("RGB", truth["mask"].size), **error.fields, **truth)
    result = ConceptSegmentation.failed(str(error), sample.prompt)
    record = make_record(sample, result, protocol, metrics)
    return record if error.truth is not None else record | {"present": None, "rejected": None}
