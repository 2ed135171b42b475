"""Bootstrap intervals of means over samples (percentile method), the same on every machine."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
_BLOCK = 4_000_000  # draws at a time, so that memory stays small


@dataclass(frozen=True)
class Interval:
    """A mean, and where it would mostly lie had other samples been drawn.

    Attributes:
        mean: The mean.
        low: Lower end.
        high: Upper end.
        samples: How many values it is over.
    """

    mean: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Resampled:
    """A mean and the means of samples drawn from its samples, as many and with replacement.

    Attributes:
        mean: The mean.
        means: (resamples,) the means of the resamples.
        samples: How many values it is over.
        smallest: How many the smallest of its parts is over.
    """

    mean: float
    means: np.ndarray = field(repr=False)
    samples: int
    smallest: int

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """The interval that holds this share of the resampled means, as much beyond its lower as its upper end.

        Raises:
            ValueError: If the share is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"interval: confidence is {confidence}; use a share between 0 and 1.")
        tail = 50 * (1 - confidence)
        low, high = np.percentile(self.means, (tail, 100 - tail))
        return Interval(self.mean, float(low), float(high), self.samples)


def resample(values: Sequence[float], stream: str = "", resamples: int = RESAMPLES) -> Resampled | None:
    """Resamples a mean.

    A paired comparison resamples the differences of the pairs.

    Args:
        values: One per sample.
        stream: Name of the stream of chance: means that are averaged later need different ones.
        resamples: How often to draw.

    Returns:
        The mean with its resamples; None if there are no values.

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


def average(parts: Sequence[Resampled | None]) -> Resampled | None:
    """The mean of means that count alike, such as those of a group's data sets; None if there are none."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return Resampled(
        sum(part.mean for part in known) / len(known),
        np.mean([part.means for part in known], axis=0),
        sum(part.samples for part in known),
        min(part.smallest for part in known),
    )
