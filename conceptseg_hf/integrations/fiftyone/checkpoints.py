"""Load checkpoints by name, cache one pipeline per process, and segment batches with it."""

from __future__ import annotations

import gc
import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModel

from ...cards import is_hub_id
from ...concept_prompt import ConceptPrompt, concept_hash
from ...coprs import CoPRSConfig, CoPRSForSegmentation
from ...coprs.inference import check_router
from ...hashing import HASHED_VALUES
from ...loading import find_checkpoint, load_config, load_model_and_processor
from ...outputs import ConceptSegmentation
from ...pipelines import ConceptSegmentationPipeline
from ...shipped import find_embedded_checkpoint

NANO = "nano"
"""Name of the checkpoint that is included in the package."""

_lock = threading.Lock()
_cached: dict[tuple[str, str | None], ConceptSegmentationPipeline] = {}


def fault_of(checkpoint: str) -> str | None:
    """Return a message that explains why a checkpoint name is invalid, or None; hub ids are not looked up."""
    try:
        if find_embedded_checkpoint(checkpoint) is not None:
            return None
    except FileNotFoundError as error:
        return str(error)
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return None
        return f"checkpoint {checkpoint!r} is a folder without config.json; use the folder that contains it."
    if is_hub_id(checkpoint):
        return None
    return f"checkpoint {checkpoint!r} was not found; use 'nano', a folder, or a hub id such as owner/name."


def is_coprs(checkpoint: str) -> bool:
    """Whether a folder, or an embedded checkpoint, is a CoPRS model; hub ids are not looked up."""
    try:
        folder = Path(find_checkpoint(Path(checkpoint).expanduser()))
        return folder.is_dir() and isinstance(load_config(str(folder)), CoPRSConfig)
    except (OSError, ValueError):
        return False


def fault_of_router(router: str, checkpoint: str) -> str | None:
    """Return a message if a checkpoint does not support a router mode, or None."""
    try:
        if is_coprs(checkpoint):
            check_router(router)
    except ValueError as error:
        return str(error)
    return None


def check_pipeline(pipeline: ConceptSegmentationPipeline, router: str, concept: ConceptPrompt | None) -> None:
    """Check that a model supports the settings of a run, so that not every sample fails.

    Raises:
        ValueError: If it does not support the router mode, or the concept was made with other weights.
    """
    if isinstance(pipeline.model, CoPRSForSegmentation):
        check_router(router)
    if concept is not None:
        concept.check_model(pipeline.model)


def get_pipeline(checkpoint: str = NANO, device: str | None = None) -> ConceptSegmentationPipeline:
    """Return the pipeline of a checkpoint; the most recent one is cached and reused.

    Args:
        checkpoint: `"nano"`, a folder or a hub id.
        device: Device such as `"cuda"`; by default the first accelerator, or the CPU if there is none.

    Raises:
        ValueError: If the checkpoint was not found or cannot be used.
        OSError: If its files cannot be read.
    """
    fault = fault_of(checkpoint)
    if fault is not None:
        raise ValueError(fault)
    key = (checkpoint, device)
    with _lock:
        if key not in _cached:
            _cached.clear()  # keep a single model: two 7B models may not fit on one GPU
            model, processor = load_model_and_processor(Path(checkpoint).expanduser(), device)
            _cached[key] = ConceptSegmentationPipeline(model=model, processor=processor, device=model.device)
        return _cached[key]


def concept_hash_of(checkpoint: str) -> str | None:
    """Return the `concept_hash` of a checkpoint without loading it; None for a hub id whose model is not cached.

    The hash is computed from the weight files of a folder, of which only the first values of each weight are read.

    Raises:
        ValueError: If the folder has no readable checkpoint.
        OSError: If its files cannot be read.
    """
    with _lock:
        cached = [pipeline for (name, _), pipeline in _cached.items() if name == checkpoint]
    if cached:
        return concept_hash(cached[0].model)
    folder = Path(find_checkpoint(Path(checkpoint).expanduser()))
    if not folder.is_dir():
        return None
    files = sorted(folder.glob("*.safetensors"))
    return _hash_of_files(str(folder), tuple((str(path), path.stat().st_mtime_ns) for path in files))


def fault_of_concept(concept: ConceptPrompt, checkpoint: str) -> str | None:
    """Return a message if a concept was made with other weights than those of a checkpoint, or None.

    The weights of a hub id are unknown until its model is loaded; a run compares them then.
    """
    try:
        found = concept_hash_of(checkpoint)
        if found is not None:
            concept.check_hash(found)
    except (ValueError, OSError) as error:
        return str(error)
    return None


@lru_cache(maxsize=16)
def _hash_of_files(folder: str, files: tuple[tuple[str, int], ...]) -> str | None:
    """Return the `concept_hash` of a folder, or None if its files do not have all weights by name.

    Args:
        folder: The folder.
        files: Path and time of the last change of each weight file.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(load_config(folder))
    stored = {}
    for path, _ in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(("sam.", "ctm.")):
                    stored[name] = _first_values(file.get_slice(name))
    try:
        return concept_hash(model, stored)
    except KeyError:  # for example, the weights are stored in another format
        return None


def _first_values(weight: Any) -> torch.Tensor:
    """Return the first values of a weight in a file, at least as many as are hashed."""
    shape = weight.get_shape()
    if not shape:
        return weight[...]
    return weight[: math.ceil(HASHED_VALUES / max(1, math.prod(shape[1:])))]


def segment_batch(
    pipeline: ConceptSegmentationPipeline, items: list[dict[str, Any]], settings: dict[str, Any]
) -> list[ConceptSegmentation]:
    """Segment a batch; if the model fails, retry item by item so that only the failing items return an error.

    Args:
        pipeline: Pipeline with the model and the processor.
        items: Inputs of the pipeline, each with `prompt`.
        settings: Further keyword arguments of `ConceptSegForSegmentation.segment`.
    """
    try:
        samples = [pipeline.preprocess(item) for item in items]
        return pipeline.model.segment(samples, processor=pipeline.processor, **settings)
    except Exception as error:  # out of memory, for example
        if len(items) > 1:
            return [result for item in items for result in segment_batch(pipeline, [item], settings)]
        return [ConceptSegmentation.failed(f"the model failed: {error}", items[0]["prompt"])]


def release_models() -> int:
    """Remove the cached model from memory and return how many there were; a run in progress keeps it until its end."""
    with _lock:
        count = len(_cached)
        _cached.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return count
