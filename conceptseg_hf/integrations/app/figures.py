"""Images of the page: mask and box on the image, heatmap, and the check on its reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from PIL import Image

from ...images import load_gray_mask, load_image
from ...outputs import ConceptSegmentation
from ...references import Reference
from ...visualization import draw_box, draw_mosaic, heatmap_overlay, overlay

LAYERS = ("mask", "box", "heatmap")
_MIN_SIDE = 512


def draw_layers(
    image: Image.Image, result: ConceptSegmentation, layers: Collection[str] = ("mask", "box")
) -> Image.Image:
    """Draw the selected layers of a result on its image.

    Args:
        image: The image.
        result: The result; the heatmap requires `return_heatmap=True`.
        layers: Names from `LAYERS`.
    """
    scale = _scale(image)
    shown = _enlarge(image.convert("RGB"), scale)
    if "heatmap" in layers and result.heatmap is not None:
        heatmap = result.heatmap.repeat(scale, axis=0).repeat(scale, axis=1)
        shown = heatmap_overlay(shown, heatmap, opacity=0.75)
    if "mask" in layers and result.mask is not None:
        shown = overlay(shown, _enlarge(result.mask, scale))
    if "box" in layers and result.box is not None:
        x1, y1, x2, y2 = result.box
        shown = draw_box(shown, (x1 * scale, y1 * scale, x2 * scale, y2 * scale))
    return shown


def _scale(image: Image.Image) -> int:
    """Return the factor by which a small image is enlarged, so that lines drawn on it are thin."""
    return max(1, round(_MIN_SIDE / max(image.size)))


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def draw_check(
    references: Sequence[Reference], result: ConceptSegmentation, size: int = 480
) -> Image.Image | None:
    """Draw the mosaic of the references with the check box of a result; None without references."""
    if not references:
        return None
    check = None
    if result.check is not None and result.check_reference is not None:
        check = (result.check_reference, result.check)
    return draw_mosaic(references, size, check)


def draw_reference(reference: Reference) -> Image.Image:
    """Draw a reference with its mask or box."""
    image, boxes = load_image(reference.image), reference.boxes or ()
    scale = _scale(image)
    shown = _enlarge(image, scale)
    if reference.box is not None:
        boxes = (reference.box,)
    for x1, y1, x2, y2 in boxes:
        shown = draw_box(shown, (x1 * scale, y1 * scale, x2 * scale, y2 * scale))
    if not boxes and reference.mask is not None:
        shown = overlay(shown, _enlarge(load_gray_mask(reference.mask), scale))
    return shown
