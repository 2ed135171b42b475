"""Scoring: masks against masks, and a model against a benchmark."""

from .evaluator import evaluate
from .metrics import MaskMetrics, box_iou, foreground_iou, presence_auc, score_masks
from .report import EvaluationReport

__all__ = [
    "EvaluationReport",
    "MaskMetrics",
    "box_iou",
    "evaluate",
    "foreground_iou",
    "presence_auc",
    "score_masks",
]
