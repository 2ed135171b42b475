"""Scoring: masks against masks, and a model against a benchmark."""

from .ablation import ablate, load_ablation
from .comparison import compare
from .evaluator import evaluate
from .metrics import MaskMetrics, box_iou, foreground_iou, presence_auc, score_masks
from .report import EvaluationReport

__all__ = [
    "EvaluationReport",
    "MaskMetrics",
    "ablate",
    "box_iou",
    "compare",
    "evaluate",
    "foreground_iou",
    "load_ablation",
    "presence_auc",
    "score_masks",
]
