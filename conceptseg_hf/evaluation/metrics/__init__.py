"""Metrics of masks: `masks` computes them, `protocols` defines how masks are resized and thresholded beforehand."""

from .masks import (
    LIBRARY_METRICS,
    METRICS,
    MaskMetrics,
    box_iou,
    foreground_iou,
    presence_auc,
    score_masks,
)
from .protocols import PROTOCOLS, get_protocol

__all__ = [
    "LIBRARY_METRICS",
    "METRICS",
    "PROTOCOLS",
    "MaskMetrics",
    "box_iou",
    "foreground_iou",
    "get_protocol",
    "presence_auc",
    "score_masks",
]
