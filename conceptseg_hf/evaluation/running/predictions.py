"""Evaluation of masks from any other method, such as a baseline, by the metrics and records of `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...data import ConceptSample, UnreadableSampleError
from ...images import mask_to_image
from ...outputs import ConceptSegmentation
from ...progress import progress_bar
from ..distributed import ALONE
from ..metrics import METRICS, MaskMetrics, get_protocol
from ..records import RECORD_FORMAT, make_error_record, make_record
from ..records.samples import describe_samples, identify_sample, read_sample
from ..records.store import Record, RecordStore
from ..reporting.report import EvaluationReport

Predict = Callable[[ConceptSample], "np.ndarray | Image.Image"]
"""Returns the mask of a sample, (H, W) bool or "L", at the size of its image."""

_BLOCK = 32  # records that are written together


def evaluate_masks(
    predict: Predict,
    samples: Sequence[ConceptSample],
    method: str,
    output_dir: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    indices: Sequence[int] | None = None,
    protocol: str = "standard",
    metrics: Sequence[str] = METRICS,
    progress: bool = False,
) -> EvaluationReport:
    """Evaluate a function that predicts masks. `compare` accepts the output together with that of `evaluate`.

    Args:
        predict: The function. If it raises a ValueError, the sample failed and counts as an empty mask.
        samples: The samples, such as the result of `load_benchmark`.
        method: Name of the method, which takes the place of the checkpoint in reports.
        output_dir: Folder for the records and the report; existing records of the same method, settings and samples are
            kept.
        settings: Settings of the method; records of other settings are refused.
        indices: Indices of the samples to evaluate; all by default.
        protocol: See `protocols`.
        metrics: See `MaskMetrics`.
        progress: Whether to show a progress bar.

    Returns:
        The report.

    Raises:
        ValueError: If there are no samples, or the folder holds the records of another run.
    """
    get_protocol(protocol)
    MaskMetrics(metrics=metrics)
    indices = range(len(samples)) if indices is None else indices
    if not len(indices):
        raise ValueError("evaluate_masks: there are no samples; give at least one.")
    run = {
        **describe_samples(samples),
        "protocol": protocol,
        "metrics": list(metrics),
        "model": method,
        **(settings or {}),
        "record_format": RECORD_FORMAT,
    }
    folder = None if output_dir is None else Path(output_dir)
    with RecordStore(folder, run, ALONE, len(samples), partial(identify_sample, samples)) as records:
        pending = [index for index in indices if index not in records or records[index]["error"] is not None]
        bar = (
            progress_bar(len(indices), "samples", method, initial=len(indices) - len(pending))
            if progress
            else None
        )
        for start in range(0, len(pending), _BLOCK):
            block = pending[start : start + _BLOCK]
            made = ((index, _evaluate(predict, samples, index, protocol, metrics)) for index in block)
            records.add((index, record | identify_sample(samples, index)) for index, record in made)
            if bar is not None:
                bar.update(len(block))
        if bar is not None:
            bar.close()
        records.finish()
        report = EvaluationReport([records[index] for index in indices], run)
    if folder is not None:
        report.write(folder)
    return report


def _evaluate(
    predict: Predict, samples: Sequence[ConceptSample], index: int, protocol: str, metrics: Sequence[str]
) -> Record:
    sample = read_sample(samples, index, protocol)
    if isinstance(sample, UnreadableSampleError):
        return make_error_record(sample, protocol, metrics)
    try:
        result = _result(predict(sample), sample)
    except ValueError as error:
        result = ConceptSegmentation.failed(str(error), sample.prompt)
    return make_record(sample, result, protocol, metrics)


def _result(mask: np.ndarray | Image.Image, sample: ConceptSample) -> ConceptSegmentation:
    if not isinstance(mask, Image.Image):
        mask = mask_to_image(np.asarray(mask))
    if mask.size != sample.image.size:
        raise ValueError(
            f"the mask of sample {sample.sample_id!r} has the size {mask.size}, but its image {sample.image.size}; "
            "return a mask of the size of the image."
        )
    return ConceptSegmentation(mask, sample.prompt, 0.0)


__all__ = ["Predict", "evaluate_masks"]
