"""Evaluates checkpoints of arms on held-out samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, parse_completion
from conceptseg_hf.data import ConceptSample
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.writing import json_text, write_file

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 64},
    "sampled": {"max_new_tokens": 64, "do_sample": True, "temperature": 1.0, "top_k": 0},
}
MEASURES = ("mask_iou", "box_iou", "check_iou", "chosen", "format")
"""What is measured per sample, each between 0 and 1; `chosen` is 1 if the mask selects the target."""

Values = dict[str, list[float | None]]


def measure(
    checkpoint: Path,
    samples: Mapping[str, Sequence[ConceptSample]],
    prompted_by: str,
    meta_reasoning: bool,
    path: Path,
) -> dict[str, Values]:
    """Measures a checkpoint, greedy and sampled, or reads the values that were measured before.

    Args:
        checkpoint: Folder of the checkpoint.
        samples: Held-out samples by evaluation set.
        prompted_by: See `ConceptSegForSegmentation.segment`.
        meta_reasoning: Whether completions must contain `<rule>`, and `<check>` if there is a proxy query.
        path: JSON file of the values.

    Returns:
        For each set and decoding ("trained families, greedy"), the values of each measure, one per sample.
    """
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    model = ConceptSegForSegmentation.from_pretrained(checkpoint)
    processor = ConceptSegProcessor.from_pretrained(checkpoint)
    values: dict[str, Values] = {}
    for name, some_samples in samples.items():
        for decoding, generation_config in DECODING.items():
            torch.manual_seed(0)
            report = evaluate(
                model,
                some_samples,
                processor=processor,
                router="full_reasoning",
                sam_prompt=prompted_by,
                generation_config=generation_config,
                batch_size=50,
            )
            values[f"{name}, {decoding}"] = values_of(report.records, meta_reasoning)
    write_file(path, json_text(values) + "\n")
    return values


def values_of(records: Sequence[Mapping[str, Any]], meta_reasoning: bool = True) -> Values:
    """Extracts the measures from records of an evaluation."""
    chosen = [record.get("chosen") for record in records]
    return {
        "mask_iou": [record["foreground_iou"] for record in records],
        "box_iou": [record["box_iou"] for record in records],
        "check_iou": [record["check_iou"] for record in records],
        "chosen": [None if role is None else float(role == "target") for role in chosen],
        "format": [
            float(parse_completion(record["completion"] or "", expect_rule=meta_reasoning).is_valid)
            for record in records
        ],
    }
