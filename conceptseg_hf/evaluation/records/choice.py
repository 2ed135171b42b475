"""Object choice: which object a mask selects, for samples with candidate objects."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...data import ConceptSample

TARGET, ANCHOR, NOTHING = "target", "anchor", "nothing"


def choice_values(sample: ConceptSample, mask: np.ndarray) -> dict[str, Any]:
    """Return the fields of a record about the object choice; empty if the sample has no candidates.

    Args:
        sample: The sample.
        mask: (H, W) bool, the predicted mask.

    Returns:
        `stratum`; `chosen`: the role of the candidate with the highest IoU with the mask, "nothing" if the mask
        overlaps no candidate; `sibling_fraction`: the masked fraction of the area of the wrong candidates (without
        anchors, which the prompt names), None if there are no wrong candidates.
    """
    if not sample.candidates:
        return {}
    ious = [_iou(mask, candidate.mask) for candidate in sample.candidates]
    best_index = int(np.argmax(ious))
    wrong_masks = [
        candidate.mask for candidate in sample.candidates if candidate.role not in (TARGET, ANCHOR)
    ]
    area = sum(int(wrong_mask.sum()) for wrong_mask in wrong_masks)
    covered = sum(int((wrong_mask & mask).sum()) for wrong_mask in wrong_masks)
    return {
        "stratum": sample.stratum,
        "chosen": sample.candidates[best_index].role if ious[best_index] > 0 else NOTHING,
        "sibling_fraction": covered / area if area else None,
    }


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 0.0
