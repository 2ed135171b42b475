"""Measures of CoPRS checkpoints per sample, for paired comparisons of experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..experiments.measuring import Values

MEASURES = ("mask_iou", "prior_iou", "auroc", "share", "chosen", "format")
"""Measures of a sample, each between 0 and 1: see `heatmap_scores`; `chosen` is 1 if the mask overlaps most with the
target, `format` if the completion follows the template."""

COMPARED = ("mask_iou", "prior_iou", "chosen")
"""Measures whose paired differences are shown."""


def values_of(records: Sequence[Mapping[str, Any]]) -> Values:
    """Compute the measures from records of an evaluation; None where one is not defined."""
    priors = [record["prior"] or {} for record in records]
    roles = [record.get("chosen") for record in records]
    return {
        "mask_iou": [record["foreground_iou"] for record in records],
        "prior_iou": [prior.get("iou") for prior in priors],
        "auroc": [prior.get("auroc") for prior in priors],
        "share": [prior.get("share") for prior in priors],
        "chosen": [None if role is None else float(role == "target") for role in roles],
        "format": [float(bool(record["format_valid"])) for record in records],
    }


__all__ = ["COMPARED", "MEASURES", "values_of"]
