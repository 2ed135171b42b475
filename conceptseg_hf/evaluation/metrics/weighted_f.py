"""The weighted F-measure (Margolin, Zelnik-Manor and Tal, CVPR 2014), beta 1.

Equal to PySODMetrics' `WeightedFmeasure` and several times faster (`benchmarks/metrics.py`): the Gaussian is separable,
and beyond the pixels that are foreground or claimed to be, nothing counts.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np

_RADIUS, _SIGMA = 3, 5.0  # of the Gaussian over which errors inside the foreground are smoothed
_EPS = np.spacing(1)


def weighted_f_measure(
    prediction: np.ndarray, ground_truth: np.ndarray, integer_errors: bool = False
) -> float:
    """Scores one image.

    Errors inside the foreground are smoothed, since a miss beside hits weighs less; errors outside weigh more the
    farther they are from the foreground.

    Args:
        prediction: (H, W) probabilities from 0 to 1, or bool.
        ground_truth: (H, W) bool.
        integer_errors: Smooth errors as integers, as code that is fed integer masks does: smoothed errors below one
            are cut to zero, so that misses cost nothing unless all pixels within three of them are missed too. For bool
            predictions only.

    Returns:
        A number in [0, 1]; 0 when the truth is empty, also for an empty prediction, as PySODMetrics has it.

    Raises:
        ValueError: If the shapes differ, or `integer_errors` is asked for probabilities.
        ImportError: If SciPy is missing.
    """
    if prediction.shape != ground_truth.shape:
        raise ValueError(
            f"weighted_f_measure: the shapes {prediction.shape} and {ground_truth.shape} differ; bring the masks "
            "to one size."
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
    # Outside, the error of the nearest foreground pixel: what lies beyond the border must not soften it.
    nearest = np.where(ground_truth, error, error[rows, columns])
    if integer_errors:
        # Cut to whole numbers, a mean of zeros and ones is one where the whole window is ones.
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
    """The rows and columns that can matter: the occupied ones and the reach of the Gaussian around them."""
    slices = []
    for axis in (1, 0):
        places = np.flatnonzero(occupied.any(axis=axis))
        slices.append(slice(max(0, places[0] - _RADIUS), places[-1] + _RADIUS + 1))
    return slices[0], slices[1]


@cache
def _gaussian() -> np.ndarray:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    return weights / weights.sum()


def load_ndimage() -> ModuleType:
    """SciPy's `ndimage`.

    Raises:
        ImportError: If SciPy is missing.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError(
            "weighted_f_measure: f_w needs SciPy; install it with: pip install conceptseg-hf[eval]"
        ) from error
    return ndimage
