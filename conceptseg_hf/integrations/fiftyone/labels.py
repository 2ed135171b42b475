"""From `ConceptSegmentation` to FiftyOne's labels.

Frames: FiftyOne's boxes are [x, y, width, height] relative to the image; ours are pixels (x1, y1, x2, y2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fiftyone as fo
import numpy as np

from ...outputs import ConceptSegmentation
from .files import probabilities_to_picture, write_picture
from .schema import FOREGROUND, PREDICTION_ATTRIBUTES


def attributes_of(result: ConceptSegmentation, prompt: str, **settings: str) -> dict[str, Any]:
    """What a label carries beside its mask: the keys of `PREDICTION_ATTRIBUTES` that are known.

    Args:
        result: The result.
        prompt: The words that were asked.
        **settings: `checkpoint`, `router` and, where it is kept, `run`.
    """
    values = result.to_dict() | {"prompt": prompt, **settings}
    return {name: values[name] for name in PREDICTION_ATTRIBUTES if values.get(name) is not None}


def to_labels(
    result: ConceptSegmentation,
    attributes: Mapping[str, Any],
    outputs: Iterable[str],
    folder: Path | None = None,
    stem: str = "",
) -> dict[str, fo.Label]:
    """The labels of a result.

    A failed result gives labels without a mask that carry `error`; FiftyOne and the evaluation see no mask there.

    Args:
        result: The result; with a heatmap, if one is wanted.
        attributes: See `attributes_of`.
        outputs: See `schema.OUTPUTS`.
        folder: Where masks and heatmaps are written; None keeps them in the label.
        stem: How their names begin.
    """
    labels: dict[str, fo.Label] = {}
    pixels = (
        None
        if result.mask is None
        else np.where(np.asarray(result.mask) >= 128, FOREGROUND, 0).astype(np.uint8)
    )
    segmentation = fo.Segmentation(**attributes)
    for output in outputs:
        if output == "segmentation":
            if pixels is not None and folder is not None:
                segmentation.mask_path = write_picture(result.mask, folder / "masks", stem)
            else:
                segmentation.mask = pixels
            labels[output] = segmentation
        elif output == "detections":
            labels[output] = _to_detections(result, pixels, attributes)
        elif output == "heatmap" and result.heatmap is not None:
            heatmap = fo.Heatmap(range=[0, 1])
            if folder is None:
                heatmap.map = result.heatmap
            else:
                picture = probabilities_to_picture(result.heatmap)
                heatmap = fo.Heatmap(map_path=write_picture(picture, folder / "heatmaps", stem))
            labels[output] = heatmap
    return labels


def _to_detections(
    result: ConceptSegmentation, pixels: np.ndarray | None, attributes: Mapping[str, Any]
) -> fo.Detections:
    """One detection per connected region; the container carries the attributes too, as there may be no region."""
    detections = fo.Detections(**attributes)
    if pixels is not None:
        label = result.label or "concept"
        found = fo.Segmentation(mask=pixels).to_detections(
            mask_targets={FOREGROUND: label}, mask_types="thing"
        )
        for detection in found.detections:
            detection.confidence = result.score
            for name, value in attributes.items():
                detection[name] = value
        detections.detections = found.detections
    return detections


def mask_of(label: fo.Segmentation | None) -> Any:
    """What `images.load_mask` reads: an array, a path, or None where there is no mask."""
    if label is None or not label.has_mask:
        return None
    return label.mask if label.mask is not None else label.mask_path


def pixel_box(bounding_box: Iterable[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A relative [x, y, width, height] box as pixels (x1, y1, x2, y2) of an image of (width, height)."""
    x, y, width, height = bounding_box
    return x * size[0], y * size[1], (x + width) * size[0], (y + height) * size[1]


def relative_box(box: Iterable[float], size: tuple[int, int]) -> list[float]:
    """Pixels (x1, y1, x2, y2) as FiftyOne's relative [x, y, width, height]."""
    x1, y1, x2, y2 = box
    return [x1 / size[0], y1 / size[1], (x2 - x1) / size[0], (y2 - y1) / size[1]]
