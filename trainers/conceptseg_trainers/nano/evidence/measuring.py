"""Evaluation of the arms' checkpoints on held-out samples."""

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
    """Evaluate a checkpoint with greedy decoding and with sampling, or read the values if the file exists.

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
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    model = ConceptSegForSegmentation.from_pretrained(checkpoint)
    processor = ConceptSegProcessor.from_pretrained(checkpoint)
    values: dict[str, Values] = {}
    for name, set_samples in samples.items():
        for decoding, generation_config in DECODING.items():
            torch.manual_seed(0)
            report = evaluate(
                model,
                set_samples,
                processor=processor,
                router=router,
                sam_prompt=prompted_by,
                generation_config=generation_config,
                batch_size=50,
            )
            values[f"{name}, {decoding}"] = values_of(report.records, meta_reasoning)
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
