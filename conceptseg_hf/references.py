"""Reference images: their boxes, their roles, and the K x K mosaic on which the MLLM sees them.

Frames (see ARCHITECTURE.md): a reference's box is in the "image" frame of that reference; `MosaicLayout` owns
the "canvas" frame. Boxes are (x1, y1, x2, y2) with x2 and y2 exclusive.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image, ImageDraw

from .images import ImageInput, as_list, load_mask, load_oriented_image, name_of

Box: TypeAlias = tuple[float, float, float, float]
Role: TypeAlias = Literal["auto", "support", "proxy"]

MAX_REFERENCES = 9
BOX_COLOUR = (255, 0, 0)
_LINE_WIDTH_AT_600 = 2  # the released mosaic: lines of 2 pixels on a canvas of 600


@dataclass(frozen=True)
class Reference:
    """An image that shows the concept, with a box or mask around it or without.

    Attributes:
        image: The picture; see `images.ImageInput`.
        mask: Foreground mask of the same size; its extreme foreground pixels become the box. Ignored when
            `box` is given.
        box: (x1, y1, x2, y2) in pixels of `image` after EXIF rotation, x2 and y2 exclusive.
        role: `"support"`: the box is shown. `"proxy"`: the box is withheld and the MLLM must find it, which
            checks its rule. `"auto"`: with two or more boxed references and no explicit proxy, the first
            boxed "auto" reference is the proxy, all others are support.
    """

    image: ImageInput
    mask: ImageInput | None = None
    box: Sequence[float] | None = None
    role: Role = "auto"

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"Reference: role is {self.role!r}; use 'auto', 'support' or 'proxy'.")


@dataclass(frozen=True)
class ResolvedReferences:
    """References after reading.

    Attributes:
        images: RGB images after EXIF rotation.
        boxes: One box in pixels of its image, or None, per image.
        proxy: Index of the proxy query, or None.
    """

    images: tuple[Image.Image, ...]
    boxes: tuple[Box | None, ...]
    proxy: int | None


@dataclass(frozen=True)
class MosaicLayout:
    """Where references lie on the square canvas: `grid` x `grid` cells, counted row by row from the top left.

    Cell edges are whole pixels (rounded, where `canvas_size` is not a multiple of `grid`), so the cells tile
    the canvas. A reference is stretched to its cell; its aspect ratio is not kept (as in the paper, D.3).

    Attributes:
        grid: Cells per side, K.
        canvas_size: Side of the canvas in pixels.
    """

    grid: int
    canvas_size: int

    def __post_init__(self) -> None:
        if self.grid < 1 or self.canvas_size < self.grid:
            raise ValueError(
                f"MosaicLayout: a {self.grid} x {self.grid} grid does not fit a canvas of {self.canvas_size} "
                "pixels; give a grid of at least 1 and a larger canvas."
            )

    def cell(self, index: int) -> tuple[int, int, int, int]:
        """The cell's rectangle on the canvas, in whole canvas pixels."""
        if not 0 <= index < self.grid**2:
            raise ValueError(f"MosaicLayout: there is no cell {index} on a {self.grid} x {self.grid} grid.")
        row, column = divmod(index, self.grid)
        return self._edge(column), self._edge(row), self._edge(column + 1), self._edge(row + 1)

    def image_to_canvas(self, box: Sequence[float], index: int, image_size: tuple[int, int]) -> Box:
        """Maps a box from the pixels of the image in cell `index` to the canvas.

        Args:
            box: Box in pixels of the image.
            index: The image's cell.
            image_size: (width, height) of the image.
        """
        left, top, right, bottom = self.cell(index)
        scale_x, scale_y = (right - left) / image_size[0], (bottom - top) / image_size[1]
        x1, y1, x2, y2 = box
        return left + x1 * scale_x, top + y1 * scale_y, left + x2 * scale_x, top + y2 * scale_y

    def canvas_to_image(self, box: Sequence[float], index: int, image_size: tuple[int, int]) -> Box:
        """Maps a canvas box to pixels of the image in cell `index`: inverts `image_to_canvas`, unclipped."""
        left, top, right, bottom = self.cell(index)
        scale_x, scale_y = image_size[0] / (right - left), image_size[1] / (bottom - top)
        x1, y1, x2, y2 = box
        return (x1 - left) * scale_x, (y1 - top) * scale_y, (x2 - left) * scale_x, (y2 - top) * scale_y

    def cell_at(self, box: Sequence[float]) -> int:
        """The cell that holds the centre of a canvas box; off the canvas, the nearest cell."""
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        column = sum(x >= self._edge(edge) for edge in range(1, self.grid))
        row = sum(y >= self._edge(edge) for edge in range(1, self.grid))
        return row * self.grid + column

    def _edge(self, index: int) -> int:
        return round(index * self.canvas_size / self.grid)


def grid_size(count: int) -> int:
    """Cells per side for `count` references: 1 -> 1, 2 to 4 -> 2, 5 to 9 -> 3.

    Raises:
        ValueError: If there are no references or more than nine.
    """
    if not 1 <= count <= MAX_REFERENCES:
        raise ValueError(
            f"references: {count} were given; a mosaic holds 1 to {MAX_REFERENCES}, so leave some out."
        )
    return math.ceil(math.sqrt(count))


def assign_cells(count: int, proxy: int | None) -> tuple[int, ...]:
    """The cell of each reference: the proxy query in cell 0 (top left), the others following in order."""
    if proxy is None:
        return tuple(range(count))
    return tuple(0 if index == proxy else index + (index < proxy) for index in range(count))


def mask_to_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box of a mask's (H, W) extreme foreground pixels, x2 and y2 exclusive; None if it is empty."""
    foreground = np.asarray(mask) != 0
    columns, rows = np.flatnonzero(foreground.any(axis=0)), np.flatnonzero(foreground.any(axis=1))
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes of one frame; 0 when both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = (
        sum(max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (first, second)) - intersection
    )
    return intersection / union if union > 0 else 0.0


def resolve_references(references: Sequence[Reference | Mapping[str, Any]]) -> ResolvedReferences:
    """Reads references, turns masks into boxes and decides which one is the proxy query.

    Args:
        references: `Reference` objects or mappings with their fields.

    Raises:
        FileNotFoundError: If an image or mask names no file.
        ValueError: If a reference is malformed (its place in the list is named), if there are more than nine,
            more than one proxy, or a proxy without any other reference.
    """
    listed = as_list(references)
    if listed is None:
        raise ValueError(f"references is a {type(references).__name__}; give a list of Reference objects.")
    if not listed:
        return ResolvedReferences((), (), None)
    grid_size(len(listed))  # refuse too many before reading any
    given = [_as_reference(reference, index) for index, reference in enumerate(listed)]
    images, boxes = [], []
    for index, reference in enumerate(given):
        try:
            image, box = read_reference(reference)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"reference {index}: {error}") from error
        except ValueError as error:
            raise ValueError(f"reference {index}: {error}") from error
        images.append(image)
        boxes.append(box)
    return ResolvedReferences(
        tuple(images), tuple(boxes), find_proxy([reference.role for reference in given], boxes)
    )


def read_reference(reference: Reference) -> tuple[Image.Image, Box | None]:
    """A reference's image, RGB and upright, and its box in pixels of it, None where it has none.

    Raises:
        FileNotFoundError: If an image or mask names no file.
        ValueError: If image, mask or box cannot be used.
    """
    image, orientation = load_oriented_image(reference.image)
    return image, _reference_box(reference, image.size, orientation)


def usable_references(
    references: Sequence[Reference | Mapping[str, Any]],
) -> tuple[list[Reference], list[str]]:
    """Those references that can be read, and what is wrong with each of the others.

    A proxy query that is left alone becomes an ordinary reference.
    """
    usable, faults = [], []
    for index, given in enumerate(references):
        try:
            reference = _as_reference(given, index)
            read_reference(reference)
        except (OSError, ValueError) as error:
            faults.append(str(error))
        else:
            usable.append(reference)
    if faults and len(usable) == 1:
        usable = [replace(usable[0], role="auto")]
    return usable, faults


def find_proxy(roles: Sequence[Role], boxes: Sequence[Box | None]) -> int | None:
    """Index of the proxy query under the rule of `Reference.role`, or None.

    Raises:
        ValueError: If more than one role is "proxy", or the only reference is one.
    """
    explicit = [index for index, role in enumerate(roles) if role == "proxy"]
    if len(explicit) > 1:
        raise ValueError(
            f"references {explicit} all have the role 'proxy'; at most one may, so make the others 'support'."
        )
    if explicit and len(roles) == 1:
        raise ValueError(
            "reference 0 is a proxy query without any support; add a reference, or make it 'support'."
        )
    if explicit:
        return explicit[0]
    boxed = [index for index, box in enumerate(boxes) if box is not None]
    if len(boxed) < 2:
        return None
    return next((index for index in boxed if roles[index] == "auto"), None)


def compose_mosaic(
    images: Sequence[Image.Image],
    boxes: Sequence[Box | None],
    layout: MosaicLayout,
    proxy: int | None = None,
) -> Image.Image:
    """Paints references on the canvas, each stretched to its cell, and draws the support boxes in red.

    Args:
        images: RGB images.
        boxes: One box in pixels of its image, or None, per image.
        layout: The grid and the size of the canvas.
        proxy: Index of the proxy query: it lies in cell 0 and its box is not drawn.

    Returns:
        An RGB image of `layout.canvas_size` squared; cells without a reference are black.
    """
    canvas = Image.new("RGB", (layout.canvas_size, layout.canvas_size))
    cells = assign_cells(len(images), proxy)
    for image, index in zip(images, cells, strict=True):
        left, top, right, bottom = layout.cell(index)
        canvas.paste(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    draw = ImageDraw.Draw(canvas)
    width = max(1, round(_LINE_WIDTH_AT_600 * layout.canvas_size / 600))
    for number, (image, box) in enumerate(zip(images, boxes, strict=True)):
        if box is None or number == proxy:
            continue
        x1, y1, x2, y2 = layout.image_to_canvas(box, cells[number], image.size)
        left, top = math.floor(x1), math.floor(y1)
        # Pillow's rectangle includes its last row and column, ours does not.
        draw.rectangle(
            (left, top, max(left, math.ceil(x2) - 1), max(top, math.ceil(y2) - 1)),
            outline=BOX_COLOUR,
            width=width,
        )
    return canvas


def _as_reference(reference: Reference | Mapping[str, Any], index: int) -> Reference:
    if isinstance(reference, Reference):
        return reference
    if not isinstance(reference, Mapping):
        raise ValueError(
            f"reference {index} is a {type(reference).__name__}; give Reference(image, mask=..., box=...)."
        )
    try:
        return Reference(**reference)
    except TypeError as error:
        raise ValueError(
            f"reference {index} has the fields {sorted(map(str, reference))}; give image, mask, box and role."
        ) from error


def _reference_box(reference: Reference, image_size: tuple[int, int], orientation: int) -> Box | None:
    if reference.box is not None:
        return _checked_box(reference.box, image_size)
    if reference.mask is None:
        return None
    box = mask_to_box(load_mask(reference.mask, image_size, orientation))
    if box is None:
        raise ValueError(no_foreground(reference.mask))
    return tuple(map(float, box))


def no_foreground(mask: ImageInput) -> str:
    """The sentence about a mask without foreground."""
    name = f" {name_of(mask)}" if isinstance(mask, (str, os.PathLike)) else ""
    return f"mask{name} has no foreground pixel; give a mask of the concept, or no mask."


def _checked_box(box: Sequence[float], image_size: tuple[int, int]) -> Box:
    """The part of a box inside its image."""
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"box is {box!r}; give four numbers (x1, y1, x2, y2) in pixels of the image."
        ) from error
    width, height = image_size
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x1 >= x2 or y1 >= y2:
        raise ValueError(
            f"box is {(x1, y1, x2, y2)}; give (x1, y1, x2, y2) in pixels with x1 < x2 and y1 < y2."
        )
    # Whole numbers may be meant: (0, 0, 1, 1) is the box of a single pixel.
    if max(width, height) > 1 and min(x1, y1) >= 0 and max(x2, y2) <= 1 and {x1, y1, x2, y2} - {0.0, 1.0}:
        raise ValueError(
            f"box {(x1, y1, x2, y2)} lies within one pixel of its image of {width} x {height} pixels and seems to be "
            "normalised; give it in pixels."
        )
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise ValueError(
            f"box {(x1, y1, x2, y2)} lies outside its image of {width} x {height} pixels; "
            "give it in pixels of that image."
        )
    return inside
