"""Metrics as pure functions.

Masks are bool arrays of shape (H, W). Wherever a ratio has nothing to count (an empty prediction of an empty
truth), the answer is right and the metric perfect. Conventions of names follow the paper (appendix E): mIoU
averages foreground and background, gIoU is the mean foreground IoU of the images, cIoU pools intersections
and unions over all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..references import box_iou

PROTOCOLS = ("standard",)
METRICS = ("miou", "giou", "ciou", "mae", "ber", "mdice")
LIBRARY_METRICS = ("f_w", "s_measure")


def foreground_iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks; 1 when both are empty.

    Args:
        prediction: (H, W) bool.
        truth: (H, W) bool.

    Raises:
        ValueError: If the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"foreground_iou: the shapes {prediction.shape} and {truth.shape} differ; bring the masks to "
            "one size."
        )
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def presence_auc(scores: Sequence[float], present: Sequence[bool]) -> float | None:
    """Probability that a sample with the concept scores above one without it (area under the ROC curve).

    Ties count half.

    Args:
        scores: Presence scores, any monotone scale.
        present: Whether the concept is there.

    Returns:
        A number in [0, 1], or None unless both kinds of samples occur.

    Raises:
        ValueError: If the lengths differ.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(present, dtype=bool)
    if values.shape != labels.shape:
        raise ValueError(f"presence_auc: got {len(values)} scores for {len(labels)} labels; give one each.")
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, counted from 1; ties share theirs
    rank_sum = ranks[inverse][labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def score_masks(
    predictions: Iterable[Any],
    ground_truths: Iterable[Any],
    protocol: str = "standard",
    ignore_index: int | None = 255,
    metrics: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Scores masks against the truth.

    Protocol `"standard"`: at the truth's resolution, pixels of `ignore_index` left out, a pixel predicted as
    foreground when its probability exceeds 0.5. MAE compares probabilities where there are some. BER is the
    mean error rate of the classes that occur.

    Args:
        predictions: Per image a bool array, a float array of probabilities, or a PIL mask (foreground from
            128), all (H, W).
        ground_truths: Per image a bool array, a PIL mask (foreground from 128; nothing ignored), or an
            integer array of labels: 0 background, 1 foreground, and `ignore_index`.
        protocol: `"standard"`.
        ignore_index: Label of the pixels that do not count, or None.
        metrics: Which ones: any of `METRICS`, and of `LIBRARY_METRICS`, which need pysodmetrics (`pip install
            conceptseg-hf[eval]`).

    Returns:
        Each metric in percent. Lower is better for mae and ber, higher for all others.

    Raises:
        ValueError: If there are no masks, their numbers or sizes differ, or a name or label is unknown.
        ImportError: If a metric needs pysodmetrics and it is missing.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"score_masks: no protocol is named {protocol!r}; use one of {', '.join(PROTOCOLS)}."
        )
    unknown = [name for name in metrics if name not in (*METRICS, *LIBRARY_METRICS)]
    if unknown:
        raise ValueError(
            f"score_masks: no metric is named {unknown[0]!r}; use some of "
            f"{', '.join((*METRICS, *LIBRARY_METRICS))}."
        )
    library = {name: _library_metric(name) for name in metrics if name in LIBRARY_METRICS}
    tables, errors = [], []
    for index, (prediction, given) in enumerate(_pairs(predictions, ground_truths)):
        truth, counted = _as_truth(given, ignore_index, index)
        probability = _as_probability(prediction, index)
        if probability.shape != truth.shape:
            raise ValueError(
                f"score_masks: prediction {index} has shape {probability.shape}, its truth {truth.shape}; "
                "bring them to the truth's size."
            )
        mask = probability > 0.5
        tables.append(
            [
                np.count_nonzero(pixels & counted)
                for pixels in (mask & truth, mask & ~truth, ~mask & truth, ~mask & ~truth)
            ]
        )
        errors.append(float(np.abs(probability - truth)[counted].mean()) if counted.any() else 0.0)
        for metric in library.values():
            metric.step(pred=np.where(counted, probability, 0.0), gt=truth & counted, normalize=False)
    if not tables:
        raise ValueError("score_masks: there are no masks; give at least one.")

    # Per image: true and false positives, false and true negatives.
    tp, fp, fn, tn = np.asarray(tables, dtype=np.float64).T
    foreground, background = _ratio(tp, tp + fp + fn), _ratio(tn, tn + fp + fn)
    values = {
        "miou": (foreground.mean() + background.mean()) / 2,
        "giou": foreground.mean(),
        "ciou": _ratio(tp.sum(), (tp + fp + fn).sum()),
        "mae": np.mean(errors),
        "ber": 1 - np.mean(_class_recall(tp, fp, fn, tn)),
        "mdice": _ratio(2 * tp, 2 * tp + fp + fn).mean(),
    }
    values |= {name: _library_result(name, metric) for name, metric in library.items()}
    return {name: 100 * float(values[name]) for name in metrics}


def _pairs(predictions: Iterable[Any], ground_truths: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    try:
        yield from zip(predictions, ground_truths, strict=True)
    except ValueError as error:
        if "zip()" not in str(error):
            raise
        raise ValueError(
            "score_masks: there are more predictions than truths, or fewer; give one prediction per truth."
        ) from error


def _as_truth(truth: Any, ignore_index: int | None, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The true mask, and where it counts."""
    if isinstance(truth, Image.Image):
        mask = np.asarray(truth.convert("L")) >= 128
        return mask, np.ones_like(mask)
    labels = np.asarray(truth)
    if labels.dtype == bool:
        return labels, np.ones_like(labels)
    counted = np.ones(labels.shape, dtype=bool) if ignore_index is None else labels != ignore_index
    if not np.isin(labels[counted], (0, 1)).all() or (
        ignore_index is not None and not counted.all() and not (labels == 1).any()
    ):
        # The second case is nearly always a mask of 0 and 255, which would count as nothing but ignored
        # pixels.
        raise ValueError(
            f"score_masks: truth {index} holds the labels {np.unique(labels)[:5].tolist()}; give 0, 1 and "
            f"{ignore_index} for ignored pixels, "
            "or a bool array for a mask of 0 and 255."
        )
    return labels == 1, counted


def _as_probability(prediction: Any, index: int) -> np.ndarray:
    if isinstance(prediction, Image.Image):
        return (np.asarray(prediction.convert("L")) >= 128).astype(np.float64)
    values = np.asarray(prediction)
    if values.dtype != bool and not (
        values.dtype.kind == "f" and (values.min(initial=0) >= 0) and (values.max(initial=0) <= 1)
    ):
        raise ValueError(
            f"score_masks: prediction {index} is a {values.dtype} array; give bool, or probabilities from "
            "0 to 1 as float."
        )
    return values.astype(np.float64)


def _ratio(numerator: Any, denominator: Any) -> Any:
    """Numerator / denominator, and 1 where there is nothing to count."""
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), 1.0)


def _class_recall(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    """Per image, the recall of foreground and background, averaged over those of the two that occur."""
    occurs = np.stack([tp + fn > 0, tn + fp > 0])
    recall = np.stack([_ratio(tp, tp + fn), _ratio(tn, tn + fp)])
    return np.where(
        occurs.any(axis=0), (recall * occurs).sum(axis=0) / np.maximum(occurs.sum(axis=0), 1), 1.0
    )


def _library_metric(name: str) -> Any:
    try:
        import py_sod_metrics
    except ImportError as error:
        raise ImportError(
            f"score_masks: {name} needs pysodmetrics; install it with: pip install conceptseg-hf[eval]"
        ) from error
    return py_sod_metrics.WeightedFmeasure(beta=1) if name == "f_w" else py_sod_metrics.Smeasure()


def _library_result(name: str, metric: Any) -> float:
    return metric.get_results()["wfm" if name == "f_w" else "sm"]


__all__ = ["METRICS", "box_iou", "foreground_iou", "presence_auc", "score_masks"]
