"""Scores of masks: `masks` has the metrics, `protocols` how two masks are brought together before they are compared."""

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
