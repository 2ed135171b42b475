"""One benchmark sample segmented and compared with its truth: a record of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..completion import parse_completion
from ..data import ConceptSample
from ..modeling_conceptseg import ConceptSegForSegmentation
from ..outputs import ConceptSegmentation
from ..processing_conceptseg import ConceptSegInputs, ConceptSegProcessor, PreparedSample
from ..router import ShortcutRouter
from .metrics import box_iou, foreground_iou

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


def make_record(sample: ConceptSample, result: ConceptSegmentation) -> dict[str, Any]:
    """Compares a result with the truth.

    Returns:
        JSON values only. Among them `foreground_iou` in the pixels of the image (a failed result counts as an
        empty mask), `box_iou` and `format_valid` where the MLLM was asked (None on the shortcut; a missing
        box counts 0), and `rejected`: the presence of the final decode is below 0.5.
    """
    truth = np.asarray(sample.mask.convert("L")) >= 128
    mask = np.zeros_like(truth) if result.mask is None else np.asarray(result.mask) >= 128
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
        "foreground_iou": foreground_iou(mask, truth),
        "pixels": [
            int(np.count_nonzero(mask & truth)),
            int(np.count_nonzero(mask)),
            int(np.count_nonzero(truth)),
        ],
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
