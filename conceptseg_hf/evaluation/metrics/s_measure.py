"""The S-measure (Fan et al., ICCV 2017), alpha 0.5, with PySODMetrics' conventions or with the released code's.

Of probabilities PySODMetrics computes it. Of masks all its means, deviations and covariances follow from a few counts,
which give the same number more than ten times faster (`benchmarks/metrics.py`).
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
    """Scores one image.

    Args:
        prediction: (H, W) probabilities from 0 to 1, or bool.
        ground_truth: (H, W) bool.
        released: Compute it as the released code does: deviations and variances are those of a population, covariances
            those of a sample, epsilons are 1e-8, and a negative sum is not cut at 0. In the blocks of a small object
            that epsilon is no small number. For bool predictions only. (Where the centroid of the foreground is in
            the last row or column, that code's answer is not a number; here the empty blocks have no weight.)

    Returns:
        A number up to 1; not below 0 unless `released`.

    Raises:
        ValueError: If `released` is asked for probabilities.
        ImportError: If pysodmetrics is missing, for probabilities.
    """
    if released and prediction.dtype != bool:
        raise ValueError(
            f"s_measure: released needs a bool prediction, not {prediction.dtype}; threshold it first."
        )
    if prediction.dtype != bool:
        metric = load_library()()
        metric.step(pred=prediction.astype(np.float64), gt=ground_truth, normalize=False)
        return float(metric.get_results()["sm"])
    size, predicted, true = (
        ground_truth.size,
        int(np.count_nonzero(prediction)),
        int(np.count_nonzero(ground_truth)),
    )
    if true in (0, size):
        fraction = predicted / size
        return fraction if true else 1 - fraction
    hits = int(np.count_nonzero(prediction & ground_truth))
    correct_outside = size - true - (predicted - hits)
    of_object = partial(_object, released=released)
    objects = true * of_object(hits, true) + (size - true) * of_object(correct_outside, size - true)
    regions = _regions(prediction, ground_truth, true, _released_similarity if released else _similarity)
    total = 0.5 * objects / size + 0.5 * regions
    return total if released else max(0.0, total)


def _object(ones: int, pixels: int, released: bool = False) -> float:
    """How near a region is to being 1 throughout, from the number of its ones."""
    mean = ones / pixels
    freedom = pixels if released else pixels - 1
    deviation = math.sqrt(ones * (pixels - ones) / (pixels * freedom)) if pixels > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + (_RELEASED_EPS if released else _EPS))


def _regions(
    prediction: np.ndarray,
    ground_truth: np.ndarray,
    true: int,
    similarity: Callable[[int, int, int, int], float],
) -> float:
    """Structural similarity of the four blocks that meet at the truth's centroid, weighted by their size."""
    height, width = ground_truth.shape
    # No pixel outside of the frame of both is counted: only its rows and columns are looked at.
    either = prediction | ground_truth
    rows, columns = (np.flatnonzero(either.any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    prediction, ground_truth = prediction[top:bottom, left:right], ground_truth[top:bottom, left:right]
    y = round(top + int(np.arange(bottom - top) @ ground_truth.sum(axis=1)) / true) + 1
    x = round(left + int(np.arange(right - left) @ ground_truth.sum(axis=0)) / true) + 1
    score = 0.0
    for rows_of, block_height in ((slice(0, max(0, y - top)), y), (slice(max(0, y - top), None), height - y)):
        for columns_of, block_width in (
            (slice(0, max(0, x - left)), x),
            (slice(max(0, x - left), None), width - x),
        ):
            pixels = block_height * block_width
            if pixels:
                block, gt_block = prediction[rows_of, columns_of], ground_truth[rows_of, columns_of]
                counts = (np.count_nonzero(each) for each in (block, gt_block, block & gt_block))
                score += pixels * similarity(pixels, *map(int, counts))
    return score / (height * width)


def _similarity(pixels: int, predicted: int, true: int, both: int) -> float:
    """SSIM of two masks of a block from counts of their ones; products are whole numbers, so that zero is zero."""
    x, y, norm = predicted / pixels, true / pixels, pixels * (pixels - 1 + _EPS)
    covariance = (both * pixels - predicted * true) / norm
    variances = (predicted * (pixels - predicted) + true * (pixels - true)) / norm
    alpha, beta = 4 * x * y * covariance, (x**2 + y**2) * variances
    if alpha:
        return alpha / (beta + _EPS)
    return 0.0 if beta else 1.0


def _released_similarity(pixels: int, predicted: int, true: int, both: int) -> float:
    """As `_similarity`, with the variances of a population beside the covariance of a sample, and a larger epsilon."""
    x, y = predicted / pixels, true / pixels
    covariance = (both * pixels - predicted * true) / (pixels * max(pixels - 1, 1))
    variances = (predicted * (pixels - predicted) + true * (pixels - true)) / pixels**2
    alpha, beta = 4 * x * y * covariance, (x**2 + y**2) * variances
    if alpha:
        return alpha / (beta + _RELEASED_EPS)
    return 0.0 if beta else 1.0


@cache
def load_library() -> Any:
    """PySODMetrics' `Smeasure`, which regions without a pixel do not turn into NaN.

    Raises:
        ImportError: If pysodmetrics is missing.
    """
    try:
        from py_sod_metrics import Smeasure
    except ImportError as error:
        raise ImportError(
            "score_masks: s_measure needs pysodmetrics; install it with: pip install conceptseg-hf[eval]"
        ) from error

    class WithoutEmptyRegions(Smeasure):
        def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
            # Where the foreground's centroid is at the border, regions are empty: their weight is 0, not their
            # score NaN.
            return super().ssim(pred, gt) if pred.size else 0.0

    return WithoutEmptyRegions
