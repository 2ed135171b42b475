"""Bootstrap confidence intervals of means over samples (percentile method), reproducible on every machine."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..metrics.heatmaps import correlation

RESAMPLES = 10_000
CONFIDENCE = 0.95
_BLOCK = 4_000_000  # draws at a time, to limit memory usage


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: The mean.
        low: Lower bound.
        high: Upper bound.
        samples: Number of values.
    """

    mean: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Resampled:
    """A mean with its bootstrap distribution.

    Attributes:
        mean: The mean.
        means: (resamples,) means of the resamples.
        samples: Number of values.
        smallest: Number of values in the smallest of the averaged parts.
    """

    mean: float
    means: np.ndarray = field(repr=False)
    samples: int
    smallest: int

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the central interval that contains a fraction `confidence` of the resampled means.

        Raises:
            ValueError: If `confidence` is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"interval: confidence is {confidence}; use a fraction between 0 and 1.")
        tail = 50 * (1 - confidence)
        low, high = np.percentile(self.means, (tail, 100 - tail))
        return Interval(self.mean, float(low), float(high), self.samples)


def resample(values: Sequence[float], stream: str = "", resamples: int = RESAMPLES) -> Resampled | None:
    """Compute the bootstrap distribution of a mean.

    For a paired comparison, pass the differences of the pairs.

    Args:
        values: One value per sample.
        stream: Name of the random stream; means that are averaged later need different streams.
        resamples: Number of resamples.

    Returns:
        The mean with its bootstrap distribution; None if there are no values.

    Raises:
        ValueError: If `resamples` is below 1.
    """
    if resamples < 1:
        raise ValueError(f"resample: resamples is {resamples}; use at least 1.")
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return None
    rng = np.random.default_rng(zlib.crc32(stream.encode()))
    block = max(1, _BLOCK // len(numbers))
    means = [
        numbers[rng.integers(len(numbers), size=(min(block, resamples - start), len(numbers)))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    return Resampled(float(numbers.mean()), np.concatenate(means), len(numbers), len(numbers))


def correlation_interval(
    first: Sequence[float | None],
    second: Sequence[float | None],
    stream: str = "",
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Compute Pearson's correlation over samples with its bootstrap interval.

    Args:
        first: One value per sample; samples without both values are skipped.
        second: The other values.
        stream: Name of the random stream.
        resamples: Number of resamples; those in which a sequence is constant are left out.

    Returns:
        The correlation and its interval; None if it is not defined, because there are fewer than three pairs, or one of
        the sequences is constant.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    values = values[~np.isnan(values).any(axis=1)]
    count = len(values)
    if count < 3 or (np.ptp(values, axis=0) == 0).any():
        return None
    rng = np.random.default_rng(zlib.crc32(stream.encode()))
    block = max(1, _BLOCK // count)
    found = []
    for start in range(0, resamples, block):
        sampled = values[rng.integers(count, size=(min(block, resamples - start), count))]
        centered = sampled - sampled.mean(axis=1, keepdims=True)
        covariance = (centered[..., 0] * centered[..., 1]).mean(axis=1)
        scale = np.sqrt((centered**2).mean(axis=1).prod(axis=1))
        found.append(covariance[scale > 1e-15] / scale[scale > 1e-15])
    drawn = np.concatenate(found)
    tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    low, high = np.quantile(drawn, tails) if len(drawn) else (-1.0, 1.0)
    return Interval(correlation(*values.T), float(low), float(high), count)


def foreground_iou(
    records: Sequence[Mapping[str, Any]], stream: str
) -> tuple[float | None, list[float] | None]:
    """Return the mean foreground IoU of the records that show their concept, and [low, high]; None if not defined.

    Args:
        records: Records of an evaluation.
        stream: See `resample`.
    """
    ious = [
        record["foreground_iou"]
        for record in records
        if record["present"] and record["foreground_iou"] is not None
    ]
    resampled = resample(ious, stream=stream)
    interval = None if resampled is None or resampled.smallest < 2 else resampled.interval()
    mean = sum(ious) / len(ious) if ious else None
    return mean, None if interval is None else [interval.low, interval.high]


def average(parts: Sequence[Resampled | None]) -> Resampled | None:
    """Average means with equal weights, such as those of a group's datasets; None if there are none."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return Resampled(
        sum(part.mean for part in known) / len(known),
        np.mean([part.means for part in known], axis=0),
        sum(part.samples for part in known),
        min(part.smallest for part in known),
    )
