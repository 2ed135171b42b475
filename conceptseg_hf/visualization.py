"""Visualization of results: mask overlays, and panels with references, image, box and mask. Requires only Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from .boxes import Box
from .images import mask_to_image
from .mosaic import MosaicSettings, assign_cells, compose_mosaic, make_layout
from .references import Reference, resolve_references

if TYPE_CHECKING:
    from .outputs import ConceptSegmentation

Color = tuple[int, int, int]

MASK_COLOR: Color = (30, 144, 255)
BOX_COLOR: Color = (255, 191, 0)
_HEATMAP_COLORS = np.array([(13, 8, 60), (126, 30, 120), (235, 105, 60), (252, 245, 170)], dtype=np.float32)
"""Colors at 0, 1/3, 2/3 and 1: dark to light, so that the order is visible without color vision."""
_BACKGROUND_COLOR: Color = (255, 255, 255)
_TEXT_COLOR: Color = (32, 32, 32)
_TITLE_COLOR: Color = (112, 112, 112)
_SHADE = 0.4
_MARGIN = 10
_MAX_ASPECT_RATIO = 8  # width / height; wider images are squeezed
_MAX_CAPTION_LINES = 12


def overlay(
    image: Image.Image,
    mask: Image.Image | np.ndarray | None,
    color: Color = MASK_COLOR,
    opacity: float = 0.45,
) -> Image.Image:
    """Tint the foreground of a mask, draw its outline and darken the background.

    Darkening keeps the mask visible on objects that have the color of the tint.

    Args:
        image: Image of any mode.
        mask: "L" image (foreground from 128) or bool array of the image's size; None draws nothing.
        color: Color of tint and outline.
        opacity: Opacity of the tint, 0 to 1.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the sizes differ or the opacity is out of range.
    """
    image = image.convert("RGB")
    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity is {opacity}; use 0 to 1.")
    if mask is None:
        return image
    if isinstance(mask, np.ndarray):
        mask = mask_to_image(mask)
    if mask.size != image.size:
        raise ValueError(
            f"overlay: mask has size {mask.size}, but its image has size {image.size}; resize one of them."
        )
    solid = mask.convert("L").point(lambda value: 255 * (value >= 128))
    tint = Image.blend(image, Image.new("RGB", image.size, color), opacity)
    dark = Image.blend(image, Image.new("RGB", image.size), _SHADE)
    tinted = Image.composite(tint, dark, solid)
    outline = ImageChops.difference(_dilate(solid, max(1, max(image.size) // 400)), solid)
    return Image.composite(Image.new("RGB", image.size, color), tinted, outline)


def heatmap_overlay(image: Image.Image, heatmap: np.ndarray, opacity: float = 0.6) -> Image.Image:
    """Blend an image with the colors of a heatmap, from dark (0) to light (1).

    Args:
        image: Image of any mode.
        heatmap: (H, W) values in [0, 1], of the image's size.
        opacity: Opacity of the colors, 0 to 1.

    Raises:
        ValueError: If the sizes differ.
    """
    image = image.convert("RGB")
    if heatmap.shape != (image.height, image.width):
        raise ValueError(
            f"heatmap_overlay: the heatmap has the size {heatmap.shape[::-1]}, but its image {image.size}; resize one "
            "of them."
        )
    steps = np.linspace(0, 1, len(_HEATMAP_COLORS))
    colors = np.stack(
        [np.interp(heatmap, steps, _HEATMAP_COLORS[:, channel]) for channel in range(3)], axis=-1
    )
    return Image.blend(image, Image.fromarray(np.rint(colors).astype(np.uint8)), opacity)


def _dilate(mask: Image.Image, radius: int) -> Image.Image:
    """Dilate a mask of 0 and 255 by `radius` pixels. Separable, so that the cost does not depend on the radius."""
    for across, down in ((radius, 0), (0, radius)):
        mask = mask.filter(ImageFilter.BoxBlur((across, down))).point(lambda value: 255 * (value > 0))
    return mask


def draw_box(image: Image.Image, box: Box, color: Color = BOX_COLOR) -> Image.Image:
    """Return a copy of an image with a box (x1, y1, x2, y2) in pixels, x2 and y2 exclusive."""
    drawn = image.convert("RGB").copy()
    x1, y1, x2, y2 = box
    left, top = round(min(x1, x2)), round(min(y1, y2))
    corners = (left, top, max(left, round(max(x1, x2)) - 1), max(top, round(max(y1, y2)) - 1))
    ImageDraw.Draw(drawn).rectangle(corners, outline=color, width=max(1, max(drawn.size) // 160))
    return drawn


def draw_mosaic(
    references: Sequence[Reference],
    size: int,
    check: tuple[int, Box] | None = None,
    settings: MosaicSettings | None = None,
) -> Image.Image:
    """Draw the reference mosaic as in the VLM's input: support boxes in red, the proxy query top left without its box.

    Args:
        references: One to nine references.
        size: Width and height of the mosaic in pixels.
        check: Index of a reference and a box in its pixels, drawn as a predicted box.
        settings: Layout settings of the processor (`ConceptSegProcessor.mosaic_settings`).

    Raises:
        FileNotFoundError: If the file of a reference does not exist.
        ValueError: If a reference cannot be used.
    """
    resolved = resolve_references(references, size, settings)
    layout = make_layout(len(references), size, settings)
    mosaic = compose_mosaic(resolved.images, resolved.all_boxes, layout, resolved.proxy, settings)
    if check is not None:
        index, box = check
        cell = assign_cells(len(references), resolved.proxy)[index]
        mosaic = draw_box(mosaic, layout.image_to_canvas(box, cell, resolved.images[index].size))
    return mosaic


def panel(
    image: Image.Image,
    mask: Image.Image | np.ndarray | None,
    references: Sequence[Reference] = (),
    box: Box | None = None,
    check: tuple[int, Box] | None = None,
    ground_truth: Image.Image | np.ndarray | None = None,
    caption: str = "",
    height: int = 320,
    mosaic_settings: MosaicSettings | None = None,
    heatmap: np.ndarray | None = None,
) -> Image.Image:
    """Draw a row of references, image with predicted box, heatmap, mask and ground truth, above a caption.

    Args:
        image: The target image.
        mask: The predicted mask, of the image's size; None if there is none.
        references: References, drawn as a mosaic if there are any.
        box: The predicted box in pixels of the image.
        check: The check box: index of its reference, and the box in pixels of that reference.
        ground_truth: The ground-truth mask, if known.
        caption: Lines of text, wrapped to the width of the panel.
        height: Height of the images in pixels.
        mosaic_settings: Layout settings of the processor.
        heatmap: (H, W) values in [0, 1], of the image's size; None to omit it.

    Returns:
        An RGB image.

    Raises:
        ValueError: If sizes do not match or a reference cannot be used.
    """
    target = image.convert("RGB")
    tiles = []
    if references:
        tiles.append(("references", draw_mosaic(references, height, check, mosaic_settings)))
    # The box is drawn after scaling, so that its line width does not depend on the size of the image.
    shown = resize_to_height(target, height)
    if box is not None:
        across, down = shown.width / target.width, shown.height / target.height
        shown = draw_box(shown, (box[0] * across, box[1] * down, box[2] * across, box[3] * down))
    tiles.append(("image" if box is None else "image and box", shown))
    if heatmap is not None:
        tiles.append(("heatmap", resize_to_height(heatmap_overlay(target, heatmap), height)))
    tiles.append(("mask", scaled_overlay(target, mask, height)))
    if ground_truth is not None:
        tiles.append(("ground truth", scaled_overlay(target, ground_truth, height)))
    return side_by_side(tiles, caption, height)


def caption_of(result: ConceptSegmentation, prompt: str, *remarks: str) -> str:
    """Return the caption of a panel: prompt, route with its scores, rule and answer, or the error."""
    lines = [f"prompt: {prompt}"]
    if result.error is not None:
        return "\n".join([*lines, f"failed: {result.error}"])
    route = f"{result.route}, score {result.score:.2f}"
    if result.presence is not None:
        route += f", SAM 3 presence {result.presence:.2f} (threshold {result.threshold:.2f})"
    lines.append("; ".join((route, *remarks)))
    if result.route in ("rule", "reasoning"):
        if result.rule is None and result.answer is None and result.heatmap is not None:
            lines.append(f"reasoning: {result.think or 'none given'}")
        else:
            lines += [f"rule: {result.rule or 'none given'}", f"answer: {result.answer or 'none given'}"]
    if result.check_iou is not None:
        lines.append(f"IoU of the check box on the proxy query: {result.check_iou:.2f}")
    return "\n".join(lines)


def resize_to_height(image: Image.Image, height: int, method: Image.Resampling | None = None) -> Image.Image:
    """Resize an image to a height; extremely wide images are compressed."""
    width = min(max(1, round(image.width * height / image.height)), _MAX_ASPECT_RATIO * height)
    if method is None:  # enlarged images keep sharp pixels
        method = Image.Resampling.LANCZOS if image.height > height else Image.Resampling.NEAREST
    return image.resize((width, height), method)


def scaled_overlay(image: Image.Image, mask: Image.Image | np.ndarray | None, height: int) -> Image.Image:
    """Draw an overlay at a given height, after scaling, so that the outline has the same width in all images.

    Args:
        image: Image of any size.
        mask: "L" image (foreground from 128) or bool array of the image's size; None draws nothing.
        height: Height of the overlay in pixels.

    Raises:
        ValueError: If the sizes differ.
    """
    if mask is None:
        return resize_to_height(image, height)
    if isinstance(mask, np.ndarray):
        mask = mask_to_image(mask)
    if mask.size != image.size:
        raise ValueError(
            f"scaled_overlay: mask has size {mask.size}, but its image has size {image.size}; resize one of them."
        )
    return overlay(resize_to_height(image, height), resize_to_height(mask, height, Image.Resampling.NEAREST))


def side_by_side(
    tiles: Sequence[tuple[str, Image.Image]], caption: str = "", height: int = 320
) -> Image.Image:
    """Arrange images in a row, with a title above each and a caption below all of them.

    Args:
        tiles: Titles and images; images of another height are scaled.
        caption: Lines of text, wrapped to the total width.
        height: Height of the images in pixels.
    """
    tiles = [
        (title, tile if tile.height == height else resize_to_height(tile, height)) for title, tile in tiles
    ]
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    width = sum(tile.width + _MARGIN for _, tile in tiles) + _MARGIN
    width = max(width, 340)
    lines = _wrap(caption, font, width - 2 * _MARGIN)
    line_height, title_height = 20, 20
    total = _MARGIN + title_height + height + _MARGIN + len(lines) * line_height + (_MARGIN if lines else 0)
    canvas = Image.new("RGB", (width, total), _BACKGROUND_COLOR)
    draw = ImageDraw.Draw(canvas)
    x = _MARGIN
    for title, tile in tiles:
        draw.text((x, _MARGIN - 4), title, fill=_TITLE_COLOR, font=small)
        canvas.paste(tile, (x, _MARGIN + title_height))
        x += tile.width + _MARGIN
    for number, line in enumerate(lines):
        draw.text(
            (_MARGIN, 2 * _MARGIN + title_height + height + number * line_height),
            line,
            fill=_TEXT_COLOR,
            font=font,
        )
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Wrap text to a width. Words that are too long are split, and text beyond the maximum number of lines is cut."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            while word:
                joined = f"{line} {word}".strip()
                if font.getlength(joined) <= width:
                    line, word = joined, ""
                elif line:
                    lines.append(line)
                    line = ""
                else:
                    fitting = next(
                        n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width
                    )
                    lines.append(word[:fitting])
                    word = word[fitting:]
                if len(lines) > _MAX_CAPTION_LINES:
                    return [*lines[: _MAX_CAPTION_LINES - 1], "…"]
        if line:
            lines.append(line)
    return lines if len(lines) <= _MAX_CAPTION_LINES else [*lines[: _MAX_CAPTION_LINES - 1], "…"]
