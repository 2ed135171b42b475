"""References from what a user has drawn on an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...boxes import Box, mask_to_box
from ...references import Reference

MASK, BOX = "brushed mask", "box around the strokes"
_OPAQUE = 32  # minimum alpha of a stroke, which has soft edges


def mark_reference(
    image: Image.Image,
    layers: Sequence[Image.Image] = (),
    kind: str = MASK,
    box: str = "",
) -> Reference:
    """Return the reference that a user has marked.

    Args:
        image: RGB image.
        layers: Drawn layers with an alpha channel; a layer of another size is scaled to the image.
        kind: `MASK` to use the strokes as a mask, `BOX` to use the box that encloses them.
        box: A box as text, "x1, y1, x2, y2" in pixels, which is used instead of the strokes if it is not empty.

    Returns:
        The reference; without marks, it is the image alone.

    Raises:
        ValueError: If the box is not four numbers, or is empty.
    """
    if box.strip():
        return Reference(image, box=parse_box(box, image.size))
    mask = np.zeros((image.height, image.width), dtype=bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        if alpha.size != image.size:
            alpha = alpha.resize(image.size, Image.Resampling.NEAREST)
        mask |= np.asarray(alpha) >= _OPAQUE
    if not mask.any():
        return Reference(image)
    return Reference(image, box=mask_to_box(mask)) if kind == BOX else Reference(image, mask=mask)


def parse_box(text: str, size: tuple[int, int]) -> Box:
    """Parse "x1, y1, x2, y2" and clip it to an image of the given (width, height).

    Raises:
        ValueError: If the text is not a box, or the box is empty.
    """
    try:
        x1, y1, x2, y2 = (float(part) for part in text.replace(";", ",").split(","))
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"the box {text!r} is not four numbers; enter x1, y1, x2, y2 in pixels of the image."
        ) from None
    width, height = size
    clipped = (max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2))
    if not (clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        raise ValueError(
            f"the box {text!r} is empty or outside of the image, which has {width} x {height} pixels; "
            "enter x1 < x2 and y1 < y2."
        )
    return clipped
