"""From `ConceptSegmentation` to FiftyOne's labels.

Frames: FiftyOne's boxes are [x, y, width, height] relative to the image; ours are pixels (x1, y1, x2, y2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fiftyone as fo
import numpy as np
from PIL import ExifTags, Image
from scipy.ndimage import find_objects
from skimage.measure import label as number_regions

from ...boxes import Box
from ...outputs import ConceptSegmentation
from .files import probabilities_to_image, write_image
from .schema import FOREGROUND, PREDICTION_ATTRIBUTES, REGION_ATTRIBUTES

_WHOLE = 1e-3  # pixels; coordinates this near to a whole number were one before they were divided


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
    image: np.ndarray | str | None = None,
    label: str | None = None,
) -> dict[str, fo.Label]:
    """The labels of a result.

    A failed result gives labels that carry `error` and an empty mask, or no detection: exporters and `apply_model`
    refuse a `Segmentation` without a mask. `predicted_mask` sees none there.

    Args:
        result: The result; with a heatmap, if one is wanted.
        attributes: See `attributes_of`.
        outputs: See `schema.OUTPUTS`.
        folder: Where masks and heatmaps are written; None keeps them in the label.
        stem: How their names begin.
        image: The image (H, W, 3) or its path: it gives the size of an empty mask.
        label: Class of the detections; the prompt by default.
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
            if result.mask is None:
                segmentation.mask = np.zeros(_size_of(image) or (1, 1), dtype=np.uint8)
            elif folder is not None:
                segmentation.mask_path = write_image(result.mask, folder / "masks", stem)
            else:
                segmentation.mask = pixels
            labels[output] = segmentation
        elif output == "detections":
            labels[output] = _to_detections(result, pixels, attributes, label)
        elif output == "heatmap" and result.heatmap is not None:
            heatmap = fo.Heatmap(range=[0, 1])
            if folder is None:
                heatmap.map = result.heatmap
            else:
                picture = probabilities_to_image(result.heatmap)
                heatmap = fo.Heatmap(map_path=write_image(picture, folder / "heatmaps", stem))
            labels[output] = heatmap
    return labels


def _to_detections(
    result: ConceptSegmentation,
    pixels: np.ndarray | None,
    attributes: Mapping[str, Any],
    label: str | None,
) -> fo.Detections:
    """One detection per connected region; the container carries the attributes too, as there may be no region."""
    detections = fo.Detections(**attributes)
    if pixels is not None:
        label = label or " ".join(attributes["prompt"].split()) or "concept"
        own = {name: value for name, value in attributes.items() if name in REGION_ATTRIBUTES}
        detections.detections = [
            fo.Detection(label=label, bounding_box=box, mask=mask, confidence=result.score, **own)
            for box, mask in regions_of(pixels > 0)
        ]
    return detections


def regions_of(mask: np.ndarray) -> Iterator[tuple[list[float], np.ndarray]]:
    """The connected regions (by edges and corners) of a mask (H, W): relative box, and mask within the box.

    `fo.Detection.to_segmentation` makes the same pixels of them.
    """
    height, width = mask.shape
    numbers = number_regions(mask)
    for number, (rows, columns) in enumerate(find_objects(numbers), start=1):
        box = relative_box((columns.start, rows.start, columns.stop, rows.stop), (width, height))
        yield box, numbers[rows, columns] == number


def mask_of(label: fo.Segmentation | None) -> Any:
    """What `images.load_mask` reads: an array, a path, or None where there is no mask."""
    if label is None or not label.has_mask:
        return None
    return label.mask if label.mask is not None else label.mask_path


def predicted_mask(label: fo.Segmentation | None) -> Any:
    """As `mask_of`, for predictions: None where there is none, or where the sample failed."""
    return None if label is None or getattr(label, "error", None) else mask_of(label)


def pixel_box(bounding_box: Iterable[float], size: tuple[int, int]) -> Box:
    """A relative [x, y, width, height] box as pixels (x1, y1, x2, y2) of an image of (width, height).

    What was a whole pixel before it was divided is one again: the mosaic rounds coordinates down.
    """
    x, y, width, height = bounding_box
    box = (x * size[0], y * size[1], (x + width) * size[0], (y + height) * size[1])
    x1, y1, x2, y2 = (float(round(value)) if abs(value - round(value)) < _WHOLE else value for value in box)
    return x1, y1, x2, y2


def relative_box(box: Iterable[float], size: tuple[int, int]) -> list[float]:
    """Pixels (x1, y1, x2, y2) as FiftyOne's relative [x, y, width, height].

    Whole pixels come back by rounding down, too, as FiftyOne does: x * W and (x + width) * W are not below x1 and x2.
    """
    x1, y1, x2, y2 = box
    (x, width), (y, height) = _relative_span(x1, x2, size[0]), _relative_span(y1, y2, size[1])
    return [x, y, width, height]


def _relative_span(start: float, end: float, length: int) -> tuple[float, float]:
    """Start and extent as shares of a length."""
    first, last = _fraction(start, length), _fraction(end, length)
    extent = last - first
    while first + extent < last:
        extent = math.nextafter(extent, math.inf)
    return first, extent


def _fraction(value: float, length: int) -> float:
    """The smallest number near value / length of which the length makes no less than the value."""
    fraction = value / length
    while fraction * length < value:
        fraction = math.nextafter(fraction, math.inf)
    return fraction


def _size_of(image: np.ndarray | str | None) -> tuple[int, int] | None:
    """(height, width) after EXIF rotation, also of most damaged files; None if it cannot be read."""
    if image is None or isinstance(image, np.ndarray):
        return None if image is None else image.shape[:2]
    turned = False
    try:
        with Image.open(image) as picture:
            with suppress(Exception):  # not every damaged file says how it is turned
                turned = picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return picture.size if turned else picture.size[::-1]
    except Exception:  # decoders raise almost anything on damaged files
        return None
