"""The S-measure (Fan et al., ICCV 2017) with alpha 0.5, as in PySODMetrics or as in the released code.

For probabilities, PySODMetrics computes it. For masks, all means, deviations and covariances follow from a few counts,
which gives the same value more than ten times faster (`benchmarks/metrics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

_EPS = np.spacing(1)
_RELEASED_EPS = 1e-8


def s_measure(prediction: np.ndarray, ground_truth: np.ndarray, released: bool = False) -> float:
    """Score one image.

    Args:
        prediction: (H, W) probabilities from 0 to 1, or bool.
        ground_truth: (H, W) bool.
        released: Follow the released code: deviations and variances are those of a population, covariances those of a
            sample, epsilons are 1e-8, and a negative sum is not clamped to 0. In the blocks of a small object this
            epsilon is not negligible. For bool predictions only. (Where the centroid of the foreground lies in the
            last row or column, the released code returns NaN; here, the empty blocks have a weight of 0.)

    Returns:
        A number of at most 1; at least 0 unless `released`.

    Raises:
        ValueError: If `released` is set and the prediction is not bool.
        ImportError: If the prediction is not bool and pysodmetrics is not installed.
    """
    if released and prediction.dtype != bool:
        raise ValueError(
            f"s_measure: released needs a bool prediction, not {prediction.dtype}; threshold it first."
        )
    if prediction.dtype != bool:
        metric = load_library()()
        metric.step(pred=prediction.astype(np.float64), gt=ground_truth, normalize=False)
        return float(metric.get_results()["sm"])
    pixels, predicted, actual = (
        ground_truth.size,
        int(np.count_nonzero(prediction)),
        int(np.count_nonzero(ground_truth)),
    )
    if actual in (0, pixels):
        fraction = predicted / pixels
        return fraction if actual else 1 - fraction
    hits = int(np.count_nonzero(prediction & ground_truth))
    correct_outside = pixels - actual - (predicted - hits)
    of_object = partial(_object, released=released)
    objects = actual * of_object(hits, actual) + (pixels - actual) * of_object(
        correct_outside, pixels - actual
    )
    regions = _regions(prediction, ground_truth, actual, _released_similarity if released else _similarity)
    total = 0.5 * objects / pixels + 0.5 * regions
    return total if released else max(0.0, total)


def _object(ones: int, pixels: int, released: bool = False) -> float:
    """Compute the object score of a region from the number of its ones; a region of ones has the highest score."""
    mean = ones / pixels
    degrees_of_freedom = pixels if released else pixels - 1
    deviation = math.sqrt(ones * (pixels - ones) / (pixels * degrees_of_freedom)) if pixels > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + (_RELEASED_EPS if released else _EPS))


def _regions(
    prediction: np.ndarray,
    ground_truth: np.ndarray,
    actual: int,
    similarity: Callable[[int, int, int, int], float],
) -> float:
    """Compute the structural similarity of the four blocks around the ground truth's centroid, weighted by size."""
    height, width = ground_truth.shape
    # Pixels outside the bounding box of both masks are zero, so it suffices to count inside it.
    union = prediction | ground_truth
    rows, columns = (np.flatnonzero(union.any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    prediction, ground_truth = prediction[top:bottom, left:right], ground_truth[top:bottom, left:right]
    y = round(top + int(np.arange(bottom - top) @ ground_truth.sum(axis=1)) / actual) + 1
    x = round(left + int(np.arange(right - left) @ ground_truth.sum(axis=0)) / actual) + 1
    score = 0.0
    for row_slice, block_height in (
        (slice(0, max(0, y - top)), y),
        (slice(max(0, y - top), None), height - y),
    ):
        for column_slice, block_width in (
            (slice(0, max(0, x - left)), x),
            (slice(max(0, x - left), None), width - x),
        ):
            pixels = block_height * block_width
            if pixels:
                block, gt_block = prediction[row_slice, column_slice], ground_truth[row_slice, column_slice]
                counts = (np.count_nonzero(values) for values in (block, gt_block, block & gt_block))
                score += pixels * similarity(pixels, *map(int, counts))
    return score / (height * width)


def _similarity(pixels: int, predicted: int, actual: int, both: int) -> float:
    """Compute the SSIM of two masks in a block from their counts of ones; integer products keep zeros exact."""
    x, y, norm = predicted / pixels, actual / pixels, pixels * (pixels - 1 + _EPS)
    covariance = (both * pixels - predicted * actual) / norm
    variances = (predicted * (pixels - predicted) + actual * (pixels - actual)) / norm
    alpha, beta = 4 * x * y * covariance, (x**2 + y**2) * variances
    if alpha:
        return alpha / (beta + _EPS)
    return 0.0 if beta else 1.0


def _released_similarity(pixels: int, predicted: int, actual: int, both: int) -> float:
    """Like `_similarity`, with population variances, a sample covariance, and a larger epsilon."""
    x, y = predicted / pixels, actual / pixels
    covariance = (both * pixels - predicted * actual) / (pixels * max(pixels - 1, 1))
    variances = (predicted * (pixels - predicted) + actual * (pixels - actual)) / pixels**2
    alpha, beta = 4 * x * y * covariance, (x**2 + y**2) * variances
    if alpha:
        return alpha / (beta + _RELEASED_EPS)
    return 0.0 if beta else 1.0


@cache
def load_library() -> Any:
    """Return PySODMetrics' `Smeasure`, changed so that regions without pixels do not result in NaN.

    Raises:
        ImportError: If pysodmetrics is not installed.
    """
    try:
        from py_sod_metrics import Smeasure
    except ImportError as error:
        raise ImportError(
            "score_masks: s_measure needs pysodmetrics; install it with: pip install conceptseg-hf[eval]"
        ) from error

    class WithoutEmptyRegions(Smeasure):
        def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
            # If the centroid of the foreground is at the border, regions are empty; their weight is 0, but their
            # score must not be NaN.
            return super().ssim(pred, gt) if pred.size else 0.0

    return WithoutEmptyRegions
