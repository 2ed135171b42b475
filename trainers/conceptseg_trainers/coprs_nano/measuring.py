"""Measurement on ConceptShapes: masks, and how well the prior of CoPRS points at the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conceptseg_hf.coprs import CoPRSForSegmentation, CoPRSProcessor
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.evaluation.reporting.bootstrap import Interval, correlation_interval, resample
from conceptseg_hf.modeling_conceptseg import ConceptSegForSegmentation
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor

from .values import values_of

Record = dict[str, Any]

_BATCH = 30


def measure(
    model: CoPRSForSegmentation | ConceptSegForSegmentation,
    processor: CoPRSProcessor | ConceptSegProcessor,
    samples: ConceptShapes,
    count: int,
    progress: bool = False,
) -> list[Record]:
    """Evaluate the first samples of a split and return their records (see `evaluation.records`) with a field `set`."""
    records = evaluate(
        model,  # type: ignore[arg-type]  # both systems have the same interface
        samples,
        processor=processor,  # type: ignore[arg-type]
        metrics=(),
        batch_size=_BATCH,
        limit=count,
        progress=progress,
    ).records
    return [{**record, "set": set_of(samples[index])} for index, record in enumerate(records)]


def set_of(sample: ConceptSample) -> str:
    """Return the name of a sample's set: the level, "CR one image" for tasks without references, or the stratum."""
    if sample.group == "which one":
        return sample.stratum
    return "CR one image" if sample.level == "CR" and not sample.references else sample.level


def summarize(records: Sequence[Record], resamples: int = 2000) -> dict[str, dict[str, float]]:
    """Return mean, and with `resamples` a 95 % bootstrap interval ("low", "high"), of each metric and set."""
    values = values_of(records)
    values["average_precision"] = [(record["prior"] or {}).get("average_precision") for record in records]
    values["correct"] = [
        float((record["think"] or "").endswith(record["gt_answer"] or "")) for record in records
    ]
    rows_of: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        rows_of.setdefault(record["set"], []).append(row)
    summary = {
        f"{metric}_{name}": bootstrap_mean([values[metric][row] for row in rows], resamples)
        for name, rows in sorted(rows_of.items())
        for metric in ("mask_iou", "prior_iou", "auroc", "average_precision", "share", "correct")
    }
    summary["format"] = bootstrap_mean(values["format"], resamples)
    present = [row for row, record in enumerate(records) if record["present"]]
    ious = [values["mask_iou"][row] for row in present]
    for metric in ("prior_iou", "average_precision"):
        qualities = [values[metric][row] for row in present]
        found = correlation_interval(qualities, ious, metric, max(1, resamples))
        summary[f"correlation_{metric}"] = _values(found, len(present), resamples)
    return summary


def bootstrap_mean(values: Sequence[float | None], resamples: int = 2000) -> dict[str, float]:
    """Return mean, 95 % bootstrap interval ("low", "high", NaN without resamples) and number ("n") of known values."""
    known = [value for value in values if value is not None]
    resampled = resample(known, resamples=max(1, resamples))
    return _values(None if resampled is None else resampled.interval(), len(known), resamples)


def _values(interval: Interval | None, count: int, resamples: int) -> dict[str, float]:
    nan = float("nan")
    if interval is None:
        return {"mean": nan, "low": nan, "high": nan, "n": count}
    low, high = (interval.low, interval.high) if resamples else (nan, nan)
    return {"mean": interval.mean, "low": low, "high": high, "n": interval.samples}
