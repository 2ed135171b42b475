"""Tests of bootstrap intervals: position, coverage and reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptseg_hf.evaluation.reporting.bootstrap import average, correlation_interval, resample


def test_interval_is_close_to_the_normal_approximation():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = resample(values).interval()
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.03
    )
    assert interval.samples == 400


def test_interval_covers_the_mean_with_its_confidence():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        interval = resample(rng.exponential(size=60), stream=str(trial), resamples=500).interval()
        covered += interval.low <= 1 <= interval.high
    assert 0.88 < covered / 300 < 0.98


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_interval_is_within_the_values_and_reproducible(values):
    first, second = resample(values, resamples=300), resample(values, resamples=300)
    interval = first.interval()
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert np.array_equal(first.means, second.means)


def test_number_of_resamples_does_not_depend_on_blocks():
    assert len(resample(np.arange(1_000_000), resamples=7).means) == 7


def test_averaged_parts_have_equal_weights_and_are_independent():
    many, few = resample(np.zeros(1000), "a"), resample([1.0, 3.0], "b")
    mean = average([many, None, few])
    assert mean.mean == 1
    assert (mean.samples, mean.smallest) == (1002, 2)
    values = np.random.default_rng(2).random(50)
    single, averaged = resample(values, "a"), average([resample(values, "a"), resample(values, "b")])
    widths = [resampled.interval().high - resampled.interval().low for resampled in (single, averaged)]
    assert widths[1] == pytest.approx(widths[0] / np.sqrt(2), rel=0.1)


def test_no_values_and_one_value():
    assert resample([]) is None
    assert average([]) is None and average([None]) is None
    interval = resample([0.5]).interval()
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="resamples is 0"):
        resample([1.0], resamples=0)
    with pytest.raises(ValueError, match="confidence is 95"):
        resample([1.0]).interval(95)


def test_correlation_interval_is_close_to_fishers():
    rng = np.random.default_rng(3)
    first = rng.normal(size=400)
    second = 0.6 * first + 0.8 * rng.normal(size=400)
    interval = correlation_interval(first.tolist(), second.tolist(), "r")
    r = np.corrcoef(first, second)[0, 1]
    low, high = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.96 / np.sqrt(397))
    assert interval.mean == pytest.approx(r, abs=1e-12) and interval.samples == 400
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)
    assert correlation_interval(first.tolist(), second.tolist(), "r") == interval


def test_correlations_that_are_not_defined():
    assert correlation_interval([], []) is None
    assert correlation_interval([0.1, 0.2], [0.3, 0.1]) is None  # always 1 or -1
    assert correlation_interval([0.1, 0.1, 0.1], [0.3, 0.1, 0.2]) is None
    pairs = correlation_interval([0.1, None, 0.2, float("nan"), 0.4], [0.2, 0.9, 0.4, 0.1, 0.8])
    assert pairs.samples == 3 and pairs.mean == pytest.approx(1)
    assert correlation_interval([0.1, 0.2, 0.3], [0.1, 0.1, 0.2], resamples=1).low >= -1
