"""Which object was chosen: for samples that know the objects that could be taken for the target."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...data import ConceptSample

TARGET, ANCHOR, NOTHING = "target", "anchor", "nothing"


def choice_values(sample: ConceptSample, mask: np.ndarray) -> dict[str, Any]:
    """What a record says of the choice; nothing where the sample has no candidates.

    Args:
        sample: The sample.
        mask: (H, W) bool, the predicted mask.

    Returns:
        `stratum`; `chosen`: the role of the candidate that the mask overlaps most (IoU), "nothing" where it overlaps
        none; `sibling_fraction`: which fraction of the area of the wrong candidates is masked (anchors, which the
        prompt names, left out), None where there are none.
    """
    if not sample.candidates:
        return {}
    ious = [_iou(mask, candidate.mask) for candidate in sample.candidates]
    best = int(np.argmax(ious))
    wrong = [item.mask for item in sample.candidates if item.role not in (TARGET, ANCHOR)]
    area = sum(int(item.sum()) for item in wrong)
    covered = sum(int((item & mask).sum()) for item in wrong)
    return {
        "stratum": sample.stratum,
        "chosen": sample.candidates[best].role if ious[best] > 0 else NOTHING,
        "sibling_fraction": covered / area if area else None,
    }


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 0.0
