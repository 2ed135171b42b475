"""Boxes (x1, y1, x2, y2), with exclusive x2 and y2, and the IoU of boxes and of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Box: TypeAlias = tuple[float, float, float, float]


def enclosing_box(boxes: Sequence[Sequence[float]]) -> Box | None:
    """Return the smallest box that encloses all boxes; None if there are no boxes."""
    if not boxes:
        return None
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def mask_to_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return the bounding box of the foreground of an (H, W) mask, x2 and y2 exclusive; None if the mask is empty."""
    foreground = np.asarray(mask) != 0
    columns, rows = np.flatnonzero(foreground.any(axis=0)), np.flatnonzero(foreground.any(axis=1))
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute the intersection over union of two boxes; 0 if both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = (
        sum(max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (first, second)) - intersection
    )
    return intersection / union if union > 0 else 0.0


def foreground_iou(
    prediction: np.ndarray, ground_truth: np.ndarray, ignore: np.ndarray | None = None
) -> float:
    """Compute the intersection over union of two masks; 1 when both are empty.

    Args:
        prediction: (H, W) bool.
        ground_truth: (H, W) bool.
        ignore: (H, W) bool, pixels to ignore.

    Raises:
        ValueError: If the shapes differ.
    """
    if prediction.shape != ground_truth.shape:
        raise ValueError(
            f"foreground_iou: the shapes {prediction.shape} and {ground_truth.shape} differ; resize the masks to "
            "the same size."
        )
    if ignore is not None:
        prediction, ground_truth = prediction & ~ignore, ground_truth & ~ignore
    union = np.count_nonzero(prediction | ground_truth)
    return np.count_nonzero(prediction & ground_truth) / union if union else 1.0
