"""Evaluation: metrics of masks, and the evaluation of a model on benchmarks."""

from .metrics import MaskMetrics, box_iou, foreground_iou, presence_auc, score_masks
from .reporting.comparison import compare
from .reporting.report import EvaluationReport
from .running.ablation import ablate, load_ablation
from .running.evaluator import evaluate
from .running.predictions import evaluate_masks

__all__ = [
    "EvaluationReport",
    "MaskMetrics",
    "ablate",
    "box_iou",
    "compare",
    "evaluate",
    "evaluate_masks",
    "foreground_iou",
    "load_ablation",
    "presence_auc",
    "score_masks",
]
