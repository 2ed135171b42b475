"""Metrics of a heatmap against a mask: how well the positional prior of CoPRS points at the target."""

from __future__ import annotations

import numpy as np

HEATMAP_METRICS = ("iou", "auroc", "average_precision", "share")
"""Keys of `heatmap_scores`."""


def heatmap_scores(
    heatmap: np.ndarray,
    mask: np.ndarray,
    others: np.ndarray | None = None,
    ignore: np.ndarray | None = None,
) -> dict[str, float]:
    """Compute all metrics of a heatmap; a metric that is not defined is NaN.

    Args:
        heatmap: (H, W) probabilities.
        mask: (H, W) bool.
        others: (H, W) bool, the pixels of sibling objects; None or empty without siblings, which have no "share".
        ignore: (H, W) bool, pixels to leave out.
    """
    has_share = others is not None and bool(others.any()) and bool(mask.any())
    if ignore is not None:
        kept = ~ignore
        heatmap, mask = heatmap[kept], mask[kept]
        others = None if others is None else others[kept]
    return {
        "iou": heatmap_iou(heatmap, mask),
        "auroc": heatmap_auroc(heatmap, mask),
        "average_precision": heatmap_average_precision(heatmap, mask),
        "share": heatmap_share(heatmap, mask, others) if has_share else float("nan"),
    }


def heatmap_auroc(heatmap: np.ndarray, mask: np.ndarray) -> float:
    """Compute the area under the ROC curve over pixels: the probability that a foreground pixel has the larger value.

    Ties count half. The result is NaN if the mask has no foreground or no background.

    Args:
        heatmap: (H, W) values.
        mask: (H, W) bool.
    """
    values, positive = heatmap.ravel(), mask.ravel().astype(bool)
    foreground, background = int(positive.sum()), int((~positive).sum())
    if not foreground or not background:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks = last - (counts - 1) / 2  # mean rank of the pixels of each value, from 1
    rank_sum = float(ranks[inverse.ravel()][positive].sum())
    return (rank_sum - foreground * (foreground + 1) / 2) / (foreground * background)


def heatmap_average_precision(heatmap: np.ndarray, mask: np.ndarray) -> float:
    """Compute the average precision over pixels: the sum of precision times the increase of recall.

    The result is NaN if the mask has no foreground.

    Args:
        heatmap: (H, W) values.
        mask: (H, W) bool.
    """
    values, positive = heatmap.ravel(), mask.ravel().astype(bool)
    if not positive.any():
        return float("nan")
    order = np.argsort(-values, kind="stable")
    values, positive = values[order], positive[order]
    is_last = np.append(values[1:] != values[:-1], True)  # pixels of equal value share a threshold
    true_positives = positive.cumsum()[is_last]
    predicted = np.flatnonzero(is_last) + 1
    recall_steps = np.diff(true_positives, prepend=0) / positive.sum()
    return float((recall_steps * true_positives / predicted).sum())


def heatmap_share(heatmap: np.ndarray, mask: np.ndarray, others: np.ndarray | None = None) -> float:
    """Compute the fraction of the heatmap's sum that is inside of a mask.

    The result is NaN if the sum is zero.

    Args:
        heatmap: (H, W) values of at least 0.
        mask: (H, W) bool.
        others: (H, W) bool, the pixels that the sum includes beside the mask, such as those of sibling objects; all by
            default.
    """
    inside = float(heatmap[mask.astype(bool)].sum())
    included = heatmap if others is None else heatmap[(others | mask).astype(bool)]
    total = float(included.sum())
    return inside / total if total > 0 else float("nan")


def heatmap_iou(heatmap: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> float:
    """Compute the IoU of the thresholded heatmap: the quality of the mask without decoding (section 4.3).

    Args:
        heatmap: (H, W) probabilities.
        mask: (H, W) bool.
        threshold: Probability threshold.

    Returns:
        The IoU; 1 if both are empty.
    """
    predicted, expected = heatmap > threshold, mask.astype(bool)
    union = int((predicted | expected).sum())
    return float((predicted & expected).sum()) / union if union else 1.0


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Compute Pearson's correlation of two sequences without the positions where one of them is NaN.

    The result is NaN if fewer than two positions remain, or one of the sequences is constant.
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
