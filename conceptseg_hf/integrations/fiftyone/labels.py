"""Convert `ConceptSegmentation` results to FiftyOne labels.

Coordinates: FiftyOne's boxes are [x, y, width, height] relative to the image; this package uses pixels (x1, y1, x2,
y2).
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
from skimage.measure import label as label_regions

from ...boxes import Box
from ...images import probabilities_to_image
from ...outputs import ConceptSegmentation
from .files import write_image
from .schema import FOREGROUND, PREDICTION_ATTRIBUTES, REGION_ATTRIBUTES

_INTEGER_TOLERANCE = (
    1e-3  # pixels; a coordinate this close to an integer was one before conversion to a fraction
)


def attributes_of(result: ConceptSegmentation, prompt: str, **settings: str) -> dict[str, Any]:
    """Return the attributes of a label: the entries of `PREDICTION_ATTRIBUTES` that are not None.

    Args:
        result: Segmentation result.
        prompt: Prompt of the sample.
        **settings: `checkpoint`, `router` and, if the settings are stored, `run`.
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
    """Convert a result to labels, by output.

    The labels of a failed result have the attribute `error` and an empty mask or no detections, because exporters and
    `apply_model` reject a `Segmentation` without a mask. `predicted_mask` returns None for them.

    Args:
        result: Segmentation result; it must have a heatmap if one is requested.
        attributes: See `attributes_of`.
        outputs: See `schema.OUTPUTS`.
        folder: Folder for mask and heatmap files; if None, the arrays are stored in the labels.
        stem: Start of the file names.
        image: Image (H, W, 3) or its path, which determines the size of an empty mask.
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
                heatmap_image = probabilities_to_image(result.heatmap)
                heatmap = fo.Heatmap(map_path=write_image(heatmap_image, folder / "heatmaps", stem))
            labels[output] = heatmap
    return labels


def _to_detections(
    result: ConceptSegmentation,
    pixels: np.ndarray | None,
    attributes: Mapping[str, Any],
    label: str | None,
) -> fo.Detections:
    """Create one detection per connected region; the container has the attributes, too, as there may be no region."""
    detections = fo.Detections(**attributes)
    if pixels is not None:
        label = label or " ".join(attributes["prompt"].split()) or "concept"
        region_attributes = {name: value for name, value in attributes.items() if name in REGION_ATTRIBUTES}
        detections.detections = [
            fo.Detection(
                label=label, bounding_box=box, mask=mask, confidence=result.score, **region_attributes
            )
            for box, mask in regions_of(pixels > 0)
        ]
    return detections


def regions_of(mask: np.ndarray) -> Iterator[tuple[list[float], np.ndarray]]:
    """Yield the 8-connected regions of a mask (H, W): the relative box, and the mask inside the box.

    `fo.Detection.to_segmentation` reproduces exactly the same pixels.
    """
    height, width = mask.shape
    region_ids = label_regions(mask)
    for region_id, (rows, columns) in enumerate(find_objects(region_ids), start=1):
        box = relative_box((columns.start, rows.start, columns.stop, rows.stop), (width, height))
        yield box, region_ids[rows, columns] == region_id


def mask_of(label: fo.Segmentation | None) -> Any:
    """Return the mask in a form that `images.load_mask` accepts: an array, a path, or None if there is no mask."""
    if label is None or not label.has_mask:
        return None
    return label.mask if label.mask is not None else label.mask_path


def predicted_mask(label: fo.Segmentation | None) -> Any:
    """Return the mask of a prediction as `mask_of` does, or None if there is no prediction or it has an error."""
    return None if label is None or getattr(label, "error", None) else mask_of(label)


def pixel_box(bounding_box: Iterable[float], size: tuple[int, int]) -> Box:
    """Convert a relative [x, y, width, height] box to pixels (x1, y1, x2, y2) in an image of size (width, height).

    Coordinates that were integers before the division become integers again, because the mosaic rounds down.
    """
    x, y, width, height = bounding_box
    box = (x * size[0], y * size[1], (x + width) * size[0], (y + height) * size[1])
    x1, y1, x2, y2 = (
        float(round(value)) if abs(value - round(value)) < _INTEGER_TOLERANCE else value for value in box
    )
    return x1, y1, x2, y2


def relative_box(box: Iterable[float], size: tuple[int, int]) -> list[float]:
    """Convert pixels (x1, y1, x2, y2) to FiftyOne's relative [x, y, width, height].

    Rounding down, as FiftyOne does, restores integer coordinates: x * W >= x1 and (x + width) * W >= x2.
    """
    x1, y1, x2, y2 = box
    (x, width), (y, height) = _relative_span(x1, x2, size[0]), _relative_span(y1, y2, size[1])
    return [x, y, width, height]


def _relative_span(start: float, end: float, length: int) -> tuple[float, float]:
    """Return start and extent as fractions of a length."""
    first, last = _fraction(start, length), _fraction(end, length)
    extent = last - first
    while first + extent < last:
        extent = math.nextafter(extent, math.inf)
    return first, extent


def _fraction(value: float, length: int) -> float:
    """Return the smallest float near value / length with fraction * length >= value."""
    fraction = value / length
    while fraction * length < value:
        fraction = math.nextafter(fraction, math.inf)
    return fraction


def _size_of(image: np.ndarray | str | None) -> tuple[int, int] | None:
    """Return (height, width) after EXIF rotation, or None if the file cannot be read; most damaged files can."""
    if image is None or isinstance(image, np.ndarray):
        return None if image is None else image.shape[:2]
    transposed = False
    try:
        with Image.open(image) as file:
            with suppress(Exception):  # the EXIF data of a damaged file may be unreadable
                transposed = file.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return file.size if transposed else file.size[::-1]
    except Exception:  # decoders raise many kinds of exceptions for damaged files
        return None
