"""Checkpoints by name, the one model that a process keeps, and what it makes of a batch."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import torch

from ...cards import is_hub_id
from ...loading import load_model_and_processor
from ...outputs import ConceptSegmentation
from ...pipelines import ConceptSegmentationPipeline

NANO = "nano"
"""Name of the embedded checkpoint."""

_lock = threading.Lock()
_kept: dict[tuple[str, str | None], ConceptSegmentationPipeline] = {}


def fault_of(checkpoint: str) -> str | None:
    """Why a name cannot be a checkpoint, in one sentence; None if it can (a hub id is not looked up)."""
    if checkpoint == NANO:
        return None
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return None
        return f"checkpoint {checkpoint!r} is a folder without config.json; give the folder that holds it."
    if is_hub_id(checkpoint):
        return None
    return f"checkpoint {checkpoint!r} was not found; give 'nano', a folder, or a hub id such as owner/name."


def get_pipeline(checkpoint: str = NANO, device: str | None = None) -> ConceptSegmentationPipeline:
    """The pipeline of a checkpoint, from the one that the process keeps if it is the same.

    Args:
        checkpoint: `"nano"`, a folder or a hub id.
        device: Such as `"cuda"`; the first accelerator by default, else the CPU.

    Raises:
        ValueError: If the checkpoint was not found or cannot be used.
        OSError: If its files cannot be read.
    """
    fault = fault_of(checkpoint)
    if fault is not None:
        raise ValueError(fault)
    key = (checkpoint, device)
    with _lock:
        if key not in _kept:
            _kept.clear()  # one at a time: two models of 7B fit no GPU
            name = None if checkpoint == NANO else str(Path(checkpoint).expanduser())
            model, processor = load_model_and_processor(name, device)
            _kept[key] = ConceptSegmentationPipeline(model=model, processor=processor, device=model.device)
        return _kept[key]


def segment_batch(
    pipeline: ConceptSegmentationPipeline, items: list[dict[str, Any]], settings: dict[str, Any]
) -> list[ConceptSegmentation]:
    """Segments a batch; where the model itself fails, one by one, so that only the guilty carry an error.

    Args:
        pipeline: The model.
        items: Inputs of the pipeline, with `prompt`.
        settings: Further arguments of `ConceptSegForSegmentation.segment`.
    """
    try:
        samples = [pipeline.preprocess(item) for item in items]
        return pipeline.model.segment(samples, processor=pipeline.processor, **settings)
    except Exception as error:  # out of memory, for example
        if len(items) > 1:
            return [result for item in items for result in segment_batch(pipeline, [item], settings)]
        return [ConceptSegmentation.failed(f"the model failed: {error}", items[0]["prompt"])]


def release_models() -> int:
    """Frees the kept model; returns how many there were. A run that still uses it keeps it until its end."""
    with _lock:
        count = len(_kept)
        _kept.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return count
