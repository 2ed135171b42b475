"""The weighted F-measure (Margolin, Zelnik-Manor and Tal, CVPR 2014) with beta 1.

Equal to PySODMetrics' `WeightedFmeasure` and several times faster (`benchmarks/metrics.py`): the Gaussian is separated
into two 1D filters, and only the region of predicted and ground truth foreground is processed.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np

_RADIUS, _SIGMA = 3, 5.0  # of the Gaussian that smooths errors inside the foreground
_EPS = np.spacing(1)


def weighted_f_measure(
    prediction: np.ndarray, ground_truth: np.ndarray, integer_errors: bool = False
) -> float:
    """Score one image.

    Errors inside the foreground are smoothed, since a miss next to hits weighs less; errors outside weigh more the
    farther they are from the foreground.

    Args:
        prediction: (H, W) probabilities from 0 to 1, or bool.
        ground_truth: (H, W) bool.
        integer_errors: Smooth errors as integers, as implementations do that are given integer masks: smoothed errors
            below 1 are truncated to 0, so a miss costs nothing unless all pixels within three pixels of it are missed
            as well. For bool predictions only.

    Returns:
        A number in [0, 1]; 0 when the ground truth is empty, even if the prediction is, as in PySODMetrics.

    Raises:
        ValueError: If the shapes differ, or `integer_errors` is set and the prediction is not bool.
        ImportError: If SciPy is not installed.
    """
    if prediction.shape != ground_truth.shape:
        raise ValueError(
            f"weighted_f_measure: the shapes {prediction.shape} and {ground_truth.shape} differ; resize the masks "
            "to the same size."
        )
    if integer_errors and prediction.dtype != bool:
        raise ValueError(
            f"weighted_f_measure: integer_errors needs a bool prediction, not {prediction.dtype}; threshold it first."
        )
    if not ground_truth.any():
        return 0.0
    ndimage = load_ndimage()
    region = _region(ground_truth | (prediction > 0))
    ground_truth, error = (
        ground_truth[region],
        np.abs(prediction[region].astype(np.float64) - ground_truth[region]),
    )
    outside = ~ground_truth
    rows, columns = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)
    # Background pixels take the error of the nearest foreground pixel, so that they do not affect the smoothing.
    nearest = np.where(ground_truth, error, error[rows, columns])
    if integer_errors:
        # Truncated to an integer, the mean of a window of zeros and ones is 1 only if all of them are ones.
        smooth = ndimage.minimum_filter(nearest, size=2 * _RADIUS + 1, mode="constant")
    else:
        smooth = ndimage.convolve1d(nearest, _gaussian(), axis=0, mode="constant")
        smooth = ndimage.convolve1d(smooth, _gaussian(), axis=1, mode="constant")
    missed = np.minimum(error, smooth)[ground_truth]
    y, x = np.nonzero(outside & (error > 0))
    distance = np.hypot(y - rows[y, x], x - columns[y, x])
    false_positives = (error[y, x] * (2 - np.exp(np.log(0.5) / 5 * distance))).sum()
    true_positives = ground_truth.sum() - missed.sum()
    recall = 1 - missed.mean()
    precision = true_positives / (true_positives + false_positives + _EPS)
    return float(2 * recall * precision / (recall + precision + _EPS))


def _region(occupied: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the occupied pixels, extended by the radius of the Gaussian."""
    slices = []
    for axis in (1, 0):
        indices = np.flatnonzero(occupied.any(axis=axis))
        slices.append(slice(max(0, indices[0] - _RADIUS), indices[-1] + _RADIUS + 1))
    return slices[0], slices[1]


@cache
def _gaussian() -> np.ndarray:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    return weights / weights.sum()


def load_ndimage() -> ModuleType:
    """Import SciPy's `ndimage`.

    Raises:
        ImportError: If SciPy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError(
            "weighted_f_measure: f_w needs SciPy; install it with: pip install conceptseg-hf[eval]"
        ) from error
    return ndimage
