"""Pictures of results: a mask over its image, and a panel that tells one prompt's story. Pillow only."""

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
_PAPER: Color = (255, 255, 255)
_INK: Color = (32, 32, 32)
_FADED: Color = (112, 112, 112)
_SHADE = 0.4
_MARGIN = 10
_LONGEST = 8  # a picture wider than so many heights is squeezed
_MAX_CAPTION_LINES = 12


def overlay(
    image: Image.Image,
    mask: Image.Image | np.ndarray | None,
    color: Color = MASK_COLOR,
    opacity: float = 0.45,
) -> Image.Image:
    """Tints the foreground of a mask, draws its outline and darkens everything else.

    The darkening shows the mask also on objects of the tint's own color.

    Args:
        image: Any mode.
        mask: "L" image (foreground from 128) or bool array of the image's size; None draws nothing.
        color: Of tint and outline.
        opacity: Of the tint, 0 to 1.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the sizes differ or the opacity is out of range.
    """
    picture = image.convert("RGB")
    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity is {opacity}; use 0 to 1.")
    if mask is None:
        return picture
    if isinstance(mask, np.ndarray):
        mask = mask_to_image(mask)
    if mask.size != picture.size:
        raise ValueError(
            f"overlay: mask is {mask.size} pixels, its image {picture.size}; bring them to one size."
        )
    solid = mask.convert("L").point(lambda value: 255 * (value >= 128))
    tint = Image.blend(picture, Image.new("RGB", picture.size, color), opacity)
    dark = Image.blend(picture, Image.new("RGB", picture.size), _SHADE)
    tinted = Image.composite(tint, dark, solid)
    outline = ImageChops.difference(_dilated(solid, max(1, max(picture.size) // 400)), solid)
    return Image.composite(Image.new("RGB", picture.size, color), tinted, outline)


def _dilated(mask: Image.Image, radius: int) -> Image.Image:
    """A mask of 0 and 255, wider by `radius` pixels; row by row, then column by column, so that width costs nothing."""
    for across, down in ((radius, 0), (0, radius)):
        mask = mask.filter(ImageFilter.BoxBlur((across, down))).point(lambda value: 255 * (value > 0))
    return mask


def draw_box(image: Image.Image, box: Box, color: Color = BOX_COLOR) -> Image.Image:
    """A copy of an image with a box (x1, y1, x2, y2) in its pixels, x2 and y2 exclusive."""
    picture = image.convert("RGB").copy()
    x1, y1, x2, y2 = box
    left, top = round(min(x1, x2)), round(min(y1, y2))
    corners = (left, top, max(left, round(max(x1, x2)) - 1), max(top, round(max(y1, y2)) - 1))
    ImageDraw.Draw(picture).rectangle(corners, outline=color, width=max(1, max(picture.size) // 160))
    return picture


def draw_mosaic(
    references: Sequence[Reference],
    size: int,
    check: tuple[int, Box] | None = None,
    settings: MosaicSettings | None = None,
) -> Image.Image:
    """The references as the VLM sees them: support boxes in red, the proxy query top left without its box.

    Args:
        references: One to nine references.
        size: Side of the picture.
        check: Index of a reference and a box in its pixels, drawn as an answer.
        settings: How the processor lays them out (`ConceptSegProcessor.mosaic_settings`).

    Raises:
        FileNotFoundError: If a reference names no file.
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
) -> Image.Image:
    """References | image with the answer's box | mask | true mask, over a caption.

    Args:
        image: The target image.
        mask: The mask found, of the image's size; None when there is none.
        references: Drawn as a mosaic, if there are any.
        box: The answer's box in pixels of the image.
        check: The check box: index of the reference it lies in, and the box in pixels of that reference.
        ground_truth: The true mask, where it is known.
        caption: Lines of text; long ones are wrapped.
        height: Of the pictures, in pixels.
        mosaic_settings: How the processor lays the references out.

    Returns:
        An RGB image.

    Raises:
        ValueError: If sizes do not match or a reference cannot be used.
    """
    target = image.convert("RGB")
    tiles = []
    if references:
        tiles.append(("references", draw_mosaic(references, height, check, mosaic_settings)))
    # A box is drawn after scaling, or its line would vanish in large images and drown small ones.
    shown = _scaled_to(target, height)
    if box is not None:
        across, down = shown.width / target.width, shown.height / target.height
        shown = draw_box(shown, (box[0] * across, box[1] * down, box[2] * across, box[3] * down))
    tiles.append(("image" if box is None else "image and box", shown))
    tiles.append(("mask", scaled_overlay(target, mask, height)))
    if ground_truth is not None:
        tiles.append(("true mask", scaled_overlay(target, ground_truth, height)))
    return side_by_side(tiles, caption, height)


def caption_of(result: ConceptSegmentation, prompt: str, *remarks: str) -> str:
    """The text under a panel: prompt, route with its numbers, rule and answer, or what went wrong."""
    lines = [f"prompt: {prompt}"]
    if result.error is not None:
        return "\n".join([*lines, f"failed: {result.error}"])
    route = f"{result.route}, score {result.score:.2f}"
    if result.presence is not None:
        route += f", SAM 3's first look {result.presence:.2f} (threshold {result.threshold:.2f})"
    lines.append("; ".join((route, *remarks)))
    if result.route == "reasoning":
        lines += [f"rule: {result.rule or 'none given'}", f"answer: {result.answer or 'none given'}"]
    if result.check_iou is not None:
        lines.append(f"check on the withheld reference: IoU {result.check_iou:.2f}")
    return "\n".join(lines)


def _scaled_to(image: Image.Image, height: int, method: Image.Resampling | None = None) -> Image.Image:
    width = min(max(1, round(image.width * height / image.height)), _LONGEST * height)
    if method is None:  # small pictures keep their pixels
        method = Image.Resampling.LANCZOS if image.height > height else Image.Resampling.NEAREST
    return image.resize((width, height), method)


def scaled_overlay(image: Image.Image, mask: Image.Image | np.ndarray | None, height: int) -> Image.Image:
    """An overlay at another height: drawn after scaling, so that outlines are as wide in any image.

    Args:
        image: Any size.
        mask: "L" image (foreground from 128) or bool array of the image's size; None draws nothing.
        height: Of the result, in pixels.

    Raises:
        ValueError: If the sizes differ.
    """
    if mask is None:
        return _scaled_to(image, height)
    if isinstance(mask, np.ndarray):
        mask = mask_to_image(mask)
    if mask.size != image.size:
        raise ValueError(
            f"scaled_overlay: mask is {mask.size} pixels, its image {image.size}; bring them to one size."
        )
    return overlay(_scaled_to(image, height), _scaled_to(mask, height, Image.Resampling.NEAREST))


def side_by_side(
    tiles: Sequence[tuple[str, Image.Image]], caption: str = "", height: int = 320
) -> Image.Image:
    """Pictures in a row, each under its title, over a caption.

    Args:
        tiles: Titles and pictures; a picture of another height is scaled.
        caption: Lines of text; long ones are wrapped.
        height: Of the pictures, in pixels.
    """
    tiles = [(title, tile if tile.height == height else _scaled_to(tile, height)) for title, tile in tiles]
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    width = sum(tile.width + _MARGIN for _, tile in tiles) + _MARGIN
    width = max(width, 340)
    lines = _wrapped(caption, font, width - 2 * _MARGIN)
    line_height, title_height = 20, 20
    total = _MARGIN + title_height + height + _MARGIN + len(lines) * line_height + (_MARGIN if lines else 0)
    canvas = Image.new("RGB", (width, total), _PAPER)
    draw = ImageDraw.Draw(canvas)
    x = _MARGIN
    for title, tile in tiles:
        draw.text((x, _MARGIN - 4), title, fill=_FADED, font=small)
        canvas.paste(tile, (x, _MARGIN + title_height))
        x += tile.width + _MARGIN
    for number, line in enumerate(lines):
        draw.text(
            (_MARGIN, 2 * _MARGIN + title_height + height + number * line_height), line, fill=_INK, font=font
        )
    return canvas


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Lines that fit a width; words that do not fit are cut, and so is a text without end."""
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
