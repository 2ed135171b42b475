"""Metrics of heatmaps, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from conceptseg_hf.evaluation.metrics.heatmaps import (
    correlation,
    heatmap_auroc,
    heatmap_average_precision,
    heatmap_iou,
    heatmap_share,
)


def test_auroc_is_the_probability_of_a_correct_order() -> None:
    rng = np.random.default_rng(0)
    heatmap, mask = rng.integers(0, 5, (6, 7)) / 4.0, rng.random((6, 7)) < 0.3
    pairs = [(float(a > b) + 0.5 * float(a == b)) for a in heatmap[mask] for b in heatmap[~mask]]
    assert heatmap_auroc(heatmap, mask) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert heatmap_auroc(mask * 1.0, mask) == 1.0
    assert heatmap_auroc(np.zeros((2, 2)), np.eye(2) > 0) == 0.5
    assert np.isnan(heatmap_auroc(heatmap, np.zeros((6, 7), dtype=bool)))


def test_average_precision_sums_precision_times_recall_steps() -> None:
    heatmap = np.array([[0.9, 0.8, 0.8, 0.1]])
    mask = np.array([[True, False, True, True]])
    # Thresholds 0.9, 0.8 (two pixels) and 0.1: precision 1, 2/3, 3/4 at recall 1/3, 2/3, 1.
    assert heatmap_average_precision(heatmap, mask) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert np.isnan(heatmap_average_precision(heatmap, mask & False))


def test_share_among_siblings() -> None:
    heatmap = np.array([[0.6, 0.2, 0.2]])
    target, others = np.array([[True, False, False]]), np.array([[False, True, False]])
    assert heatmap_share(heatmap, target) == pytest.approx(0.6)
    assert heatmap_share(heatmap, target, others) == pytest.approx(0.75)
    assert np.isnan(heatmap_share(heatmap * 0, target))


def test_iou_of_the_thresholded_heatmap() -> None:
    heatmap, mask = np.array([[0.6, 0.7, 0.2]]), np.array([[True, False, True]])
    assert heatmap_iou(heatmap, mask) == pytest.approx(1 / 3)
    assert heatmap_iou(heatmap * 0, mask & False) == 1.0


def test_correlation_ignores_missing_values() -> None:
    nan = float("nan")
    assert correlation(np.array([1, 2, nan, 4]), np.array([2, 4, 9, 8])) == pytest.approx(1.0)
    assert np.isnan(correlation(np.array([1.0, 1.0]), np.array([1.0, 2.0])))
