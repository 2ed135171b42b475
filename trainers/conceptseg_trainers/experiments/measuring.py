"""Evaluation of the arms' checkpoints on held-out samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conceptseg_hf import parse_completion
from conceptseg_hf.data import ConceptSample
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.loading import load_model_and_processor
from conceptseg_hf.writing import json_text, write_file

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 64},
    "sampled": {"max_new_tokens": 64, "do_sample": True, "temperature": 1.0, "top_k": 0},
}
MEASURES = ("mask_iou", "box_iou", "check_iou", "chosen", "format")
"""Measures of a sample, each between 0 and 1; `chosen` is 1 if the mask overlaps most with the target."""

Values = dict[str, list[float | None]]


def measure(
    checkpoint: Path,
    samples: Mapping[str, Sequence[ConceptSample]],
    prompted_by: str,
    meta_reasoning: bool,
    path: Path,
    router: str = "full_reasoning",
) -> dict[str, Values]:
    """Evaluate a checkpoint of ConceptSeg; see `measured_values`.

    Args:
        checkpoint: Folder of the checkpoint.
        samples: Held-out samples by evaluation set.
        prompted_by: Prompt of SAM 3; see `sam_prompt` of `ConceptSegForSegmentation.segment`.
        meta_reasoning: See `values_of`.
        path: JSON file of the values.
        router: Mode of the router; with "sam_only", `prompted_by` and decoding have no effect.

    Returns:
        For each set and decoding ("trained families, greedy"), the values of each measure, one per sample.
    """
    to_values = partial(values_of, meta_reasoning=meta_reasoning)
    return measured_values(checkpoint, samples, to_values, path, router=router, sam_prompt=prompted_by)


def measured_values(
    checkpoint: Path,
    samples: Mapping[str, Sequence[ConceptSample]],
    to_values: Callable[[Sequence[Mapping[str, Any]]], Values],
    path: Path,
    decoding: Mapping[str, Mapping[str, Any]] | None = None,
    router: str = "full_reasoning",
    **options: Any,
) -> dict[str, Values]:
    """Evaluate a checkpoint with greedy decoding and with sampling, or read the values if the file exists.

    Args:
        checkpoint: Folder of the checkpoint, of ConceptSeg or CoPRS.
        samples: Held-out samples by evaluation set.
        to_values: Function from records of an evaluation to the measures.
        path: JSON file of the values.
        decoding: Generation settings by name; `DECODING` by default.
        router: Mode of the router.
        **options: Further arguments of `evaluate`.

    Returns:
        For each set and decoding ("trained families, greedy"), the values of each measure, one per sample.
    """
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    model, processor = load_model_and_processor(checkpoint)
    values: dict[str, Values] = {}
    for name, set_samples in samples.items():
        for name_of_decoding, generation_config in (decoding or DECODING).items():
            torch.manual_seed(0)
            report = evaluate(
                model,
                set_samples,
                processor=processor,
                router=router,
                generation_config=dict(generation_config),
                batch_size=50,
                **options,
            )
            values[f"{name}, {name_of_decoding}"] = to_values(report.records)
    write_file(path, json_text(values) + "\n")
    return values


def values_of(records: Sequence[Mapping[str, Any]], meta_reasoning: bool = True) -> Values:
    """Compute the measures from records of an evaluation.

    Args:
        records: The records.
        meta_reasoning: Whether `<rule>`, and with a proxy query `<check>`, are required. Otherwise they are not
            allowed, and `check_iou` is not measured.
    """
    roles = [record.get("chosen") for record in records]
    return {
        "mask_iou": [record["foreground_iou"] for record in records],
        "box_iou": [record["box_iou"] for record in records],
        "check_iou": [record["check_iou"] if meta_reasoning else None for record in records],
        "chosen": [None if role is None else float(role == "target") for role in roles],
        "format": [_format(record, meta_reasoning) for record in records],
    }


def _format(record: Mapping[str, Any], meta_reasoning: bool) -> float | None:
    """Return 1 if the completion follows the template, otherwise 0; None without the VLM."""
    if record.get("route") == "shortcut":
        return None
    # `check_iou` is None without a proxy query.
    expect_check = meta_reasoning and record["check_iou"] is not None
    completion = parse_completion(
        record["completion"] or "", expect_check=expect_check, expect_rule=meta_reasoning
    )
    return float(completion.is_valid)
