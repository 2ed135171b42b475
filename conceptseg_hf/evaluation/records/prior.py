"""The positional prior in records of CoPRS: its quality, and a small copy of the heatmap."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from ...data import ConceptSample
from ...images import load_mask, probabilities_to_image
from ...outputs import ConceptSegmentation
from ..metrics.heatmaps import heatmap_scores
from .choice import ANCHOR, TARGET

_MAX_SIDE = 64  # that of SAM's features for images of 1024 pixels


def prior_values(sample: ConceptSample, result: ConceptSegmentation) -> dict[str, Any]:
    """Return the field `prior` of a record: None if the sample failed, otherwise a dictionary.

    It has the values of `heatmap_scores` ("iou", "auroc", "average_precision", "share"), each None if it is not
    defined, and `heatmap`, see `encode_heatmap`. The share is that among the sample's candidates, without anchors,
    which the prompt names. Pixels that the ground truth ignores are left out.

    Args:
        sample: The sample.
        result: The result; its heatmap is the prior.
    """
    if result.heatmap is None:
        return {"prior": None}
    scores: dict[str, float] = {}
    if not sample.box_only:
        mask = np.asarray(sample.mask) > 0
        siblings = [item.mask for item in sample.candidates if item.role not in (TARGET, ANCHOR)]
        others = np.any(siblings, axis=0) & ~mask if siblings else None
        ignore = None if sample.ignore is None else load_mask(sample.ignore, sample.mask.size)
        scores = heatmap_scores(result.heatmap, mask, others, ignore)
    values = {name: None if math.isnan(value) else value for name, value in scores.items()}
    return {"prior": {**values, "heatmap": encode_heatmap(result.heatmap)}}


def encode_heatmap(heatmap: np.ndarray) -> dict[str, Any]:
    """Encode a heatmap for display: at most 64 x 64 values in steps of 1/255.

    Args:
        heatmap: (H, W) values in [0, 1].

    Returns:
        `size` [H, W], and `png`: a PNG file in base64.
    """
    image = probabilities_to_image(heatmap)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return {"size": list(heatmap.shape), "png": base64.b64encode(file.getvalue()).decode("ascii")}


def decode_heatmap(encoded: dict[str, Any]) -> np.ndarray:
    """Decode a heatmap of `encode_heatmap` to (H, W) float32 values in [0, 1], at its original size."""
    height, width = encoded["size"]
    with Image.open(io.BytesIO(base64.b64decode(encoded["png"])), formats=["PNG"]) as image:
        resized = image.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32) / 255


__all__ = ["decode_heatmap", "encode_heatmap", "prior_values"]
