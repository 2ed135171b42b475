"""Measurement of a CoPRS model on ConceptShapes: masks, and how well the prior points at the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conceptseg_hf.coprs import CoPRSForSegmentation, CoPRSProcessor
from conceptseg_hf.coprs.completion import parse_reasoning
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.evaluation.metrics.heatmaps import heatmap_scores
from conceptseg_hf.evaluation.reporting.bootstrap import Interval, correlation_interval, resample

_BATCH = 30


@dataclass(frozen=True)
class MeasuredSample:
    """Measurements of one sample.

    Attributes:
        sample_id: Id of the sample.
        set_name: Name of its set: the level, "CR one image" for tasks without references, or the stratum.
        valid: Whether the completion follows the template.
        correct: Whether the reasoning ends with the ground-truth answer.
        mask_iou: Foreground IoU of the mask.
        prior_iou: IoU of the thresholded prior.
        auroc: AUROC of the prior; NaN if the target is absent.
        average_precision: Average precision of the prior; NaN if the target is absent.
        share: Fraction of the prior's sum over all objects that is on the target; NaN without siblings.
    """

    sample_id: str
    set_name: str
    valid: bool
    correct: bool
    mask_iou: float
    prior_iou: float
    auroc: float
    average_precision: float
    share: float


def measure(
    model: CoPRSForSegmentation, processor: CoPRSProcessor, samples: ConceptShapes, count: int, first: int = 0
) -> list[MeasuredSample]:
    """Segment and measure the samples `first` to `first + count` of a split."""
    rows = []
    for start in range(first, first + count, _BATCH):
        indices = range(start, min(start + _BATCH, first + count))
        batch = [samples[i] for i in indices]
        prepared = [processor.prepare(sample.image, sample.prompt, sample.references) for sample in batch]
        results = model.segment(prepared, processor=processor)
        for index, sample, result in zip(indices, batch, results, strict=True):
            truth = np.asarray(sample.mask) > 0
            objects = [item.mask for item in samples.task(index).scene.objects]
            others = np.any(objects, axis=0) & ~truth if objects else np.zeros_like(truth)
            assert result.heatmap is not None and result.mask is not None
            prior = heatmap_scores(result.heatmap, truth, others)
            rows.append(
                MeasuredSample(
                    sample.sample_id,
                    set_of(sample),
                    parse_reasoning(result.completion or "").is_valid,
                    (result.think or "").endswith(sample.answer or ""),
                    foreground_iou(np.asarray(result.mask) > 0, truth),
                    prior["iou"],
                    prior["auroc"],
                    prior["average_precision"],
                    prior["share"],
                )
            )
    return rows


def set_of(sample: ConceptSample) -> str:
    """Return the name of a sample's set; see `MeasuredSample`."""
    if sample.group == "which one":
        return sample.stratum
    return "CR one image" if sample.level == "CR" and not sample.references else sample.level


def summarize(rows: Sequence[MeasuredSample], resamples: int = 2000) -> dict[str, dict[str, float]]:
    """Return mean, and with `resamples` a 95 % bootstrap interval ("low", "high"), of each metric and set."""
    summary: dict[str, dict[str, float]] = {}
    sets = {
        name: [row for row in rows if row.set_name == name]
        for name in dict.fromkeys(r.set_name for r in rows)
    }
    for set_name, members in sorted(sets.items()):
        for metric in ("mask_iou", "prior_iou", "auroc", "average_precision", "share", "correct"):
            values = np.array([float(getattr(row, metric)) for row in members])
            summary[f"{metric}_{set_name}"] = bootstrap_mean(values[~np.isnan(values)], resamples)
    summary["format"] = bootstrap_mean([float(row.valid) for row in rows], resamples)
    present = [row for row in rows if not np.isnan(row.auroc)]
    ious = [row.mask_iou for row in present]
    for metric in ("prior_iou", "average_precision"):
        qualities = [getattr(row, metric) for row in present]
        found = correlation_interval(qualities, ious, metric, max(1, resamples))
        summary[f"correlation_{metric}"] = _values(found, len(present), resamples)
    return summary


def bootstrap_mean(values: Sequence[float], resamples: int = 2000) -> dict[str, float]:
    """Return mean, 95 % bootstrap interval ("low", "high", NaN without resamples) and number ("n") of values."""
    resampled = resample(values, resamples=max(1, resamples))
    return _values(None if resampled is None else resampled.interval(), len(values), resamples)


def _values(interval: Interval | None, count: int, resamples: int) -> dict[str, float]:
    nan = float("nan")
    if interval is None:
        return {"mean": nan, "low": nan, "high": nan, "n": count}
    low, high = (interval.low, interval.high) if resamples else (nan, nan)
    return {"mean": interval.mean, "low": low, "high": high, "n": interval.samples}
