"""The K x K mosaic of reference images: settings, geometry and rendering.

`MosaicLayout` defines the "canvas" frame of ARCHITECTURE.md. Boxes are (x1, y1, x2, y2) with exclusive x2 and y2,
regardless of `MosaicSettings.corners`, which controls only how boxes are written in the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .boxes import Box, mask_to_box

MAX_REFERENCES = 9
BOX_COLOR = (255, 0, 0)
_LINE_WIDTH_AT_600 = 2  # as in the released code: 2-pixel lines on a 600-pixel canvas

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""Pillow resampling filters by setting value."""

_CHOICES = {
    "resampling": tuple(RESAMPLING),
    "boxes_from": ("image", "cell"),
    "corners": ("exclusive", "inclusive"),
    "several_boxes": ("best", "enclosing"),
}


@dataclass(frozen=True)
class MosaicSettings:
    """Layout of the references, and how their boxes are computed, written and checked.

    Attributes:
        grid: Cells per side (2 or 3) for two or more references; the last references are not shown if they exceed the
            number of cells. None for the smallest grid that holds all references. A single reference always fills the
            canvas.
        resampling: Resampling filter for references: `"bicubic"` or `"bilinear"`.
        boxes_from: How boxes are computed from masks. `"image"`: the bounding box of the foreground pixels. `"cell"`:
            the bounding box of the nonzero pixels after resizing the mask (bilinear) to its cell, which has integer
            canvas coordinates.
        corners: Whether x2 and y2 in the text are one past the last canvas pixel (`"exclusive"`) or the last canvas
            pixel (`"inclusive"`).
        mark_single: Whether to draw the box if there is only one reference.
        several_boxes: Which box the check of a proxy query with several boxes is compared with: the best matching one
            (`"best"`), or the box that encloses all of them (`"enclosing"`).
    """

    grid: int | None = None
    resampling: str = "bicubic"
    boxes_from: str = "image"
    corners: str = "exclusive"
    mark_single: bool = True
    several_boxes: str = "best"

    def __post_init__(self) -> None:
        if self.grid not in (None, 2, 3):
            raise ValueError(f"MosaicSettings: grid is {self.grid!r}; use 2 or 3, or None.")
        if not isinstance(self.mark_single, bool):
            raise ValueError(f"MosaicSettings: mark_single is {self.mark_single!r}; use true or false.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"MosaicSettings: {name} is {getattr(self, name)!r}; use {' or '.join(map(repr, choices))}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-serializable data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MosaicSettings:
        """Create settings from a mapping; missing fields have their default values.

        Raises:
            ValueError: If a field is unknown or a value is invalid.
        """
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in data if name not in names]:
            raise ValueError(f"mosaic: unknown field {unknown[0]!r}; use one of {', '.join(names)}.")
        return cls(**data)


@dataclass(frozen=True)
class MosaicLayout:
    """Layout of references on the square canvas: `grid` x `grid` cells, numbered row by row from the top left.

    Cell edges are integer pixels (rounded if `canvas_size` is not a multiple of `grid`), so the cells tile the canvas.
    References are stretched to their cells without preserving the aspect ratio (paper, D.3).

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
                "pixels; use a grid of at least 1 and a larger canvas."
            )

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self.grid**2

    def cell(self, index: int) -> tuple[int, int, int, int]:
        """Return the rectangle of a cell in integer canvas pixels."""
        if index not in self:
            raise ValueError(
                f"MosaicLayout: no cell {index} in a {self.grid} x {self.grid} grid; use 0 to {self.grid**2 - 1}."
            )
        row, column = divmod(index, self.grid)
        return self._edge(column), self._edge(row), self._edge(column + 1), self._edge(row + 1)

    def image_to_canvas(self, box: Sequence[float], index: int, image_size: tuple[int, int]) -> Box:
        """Map a box from pixels of the image in cell `index` to the canvas.

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
        """Map a canvas box to pixels of the image in cell `index`, unclipped; the inverse of `image_to_canvas`."""
        left, top, right, bottom = self.cell(index)
        scale_x, scale_y = image_size[0] / (right - left), image_size[1] / (bottom - top)
        x1, y1, x2, y2 = box
        return (x1 - left) * scale_x, (y1 - top) * scale_y, (x2 - left) * scale_x, (y2 - top) * scale_y

    def cell_at(self, box: Sequence[float]) -> int:
        """Return the cell that contains the center of a canvas box, or the nearest cell if it is outside the canvas."""
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        column = sum(x >= self._edge(edge) for edge in range(1, self.grid))
        row = sum(y >= self._edge(edge) for edge in range(1, self.grid))
        return row * self.grid + column

    def _edge(self, index: int) -> int:
        return round(index * self.canvas_size / self.grid)


def grid_size(count: int) -> int:
    """Return the number of cells per side for `count` references: 1 -> 1, 2 to 4 -> 2, 5 to 9 -> 3.

    Raises:
        ValueError: If there are no references or more than nine.
    """
    if not 1 <= count <= MAX_REFERENCES:
        raise ValueError(
            f"references: {count} were given, but a mosaic holds at most {MAX_REFERENCES}; pass 1 to {MAX_REFERENCES}."
        )
    return math.ceil(math.sqrt(count))


def make_layout(count: int, canvas_size: int, settings: MosaicSettings | None = None) -> MosaicLayout:
    """Create the mosaic layout of `count` references.

    Raises:
        ValueError: If there are no references or more than nine.
    """
    grid = grid_size(count)
    if settings is not None and settings.grid is not None and count > 1:
        grid = settings.grid
    return MosaicLayout(grid, canvas_size)


def assign_cells(count: int, proxy: int | None) -> tuple[int, ...]:
    """Return the cell of each reference: the proxy query in cell 0 (top left), the others in order after it."""
    if proxy is None:
        return tuple(range(count))
    return tuple(0 if index == proxy else index + (index < proxy) for index in range(count))


def mask_to_cell_box(mask: Image.Image, cell: tuple[int, int, int, int]) -> Box | None:
    """Compute the bounding box of the nonzero pixels of a mask after resizing it (bilinear) to its cell.

    Args:
        mask: Mask of mode "L".
        cell: The cell's rectangle on the canvas.

    Returns:
        The box in integer canvas pixels; None if no pixel is nonzero after resizing.
    """
    left, top, right, bottom = cell
    box = mask_to_box(np.asarray(mask.resize((right - left, bottom - top), Image.Resampling.BILINEAR)))
    if box is None:
        return None
    return float(left + box[0]), float(top + box[1]), float(left + box[2]), float(top + box[3])


def compose_mosaic(
    images: Sequence[Image.Image],
    boxes: Sequence[Box | Sequence[Box] | None],
    layout: MosaicLayout,
    proxy: int | None = None,
    settings: MosaicSettings | None = None,
) -> Image.Image:
    """Paste references onto the canvas, each stretched to its cell, and draw the support boxes in red.

    Args:
        images: RGB images.
        boxes: For each image one box, several boxes, or None, in pixels of the image.
        layout: The grid and the size of the canvas.
        proxy: Index of the proxy query, which is placed in cell 0 without its boxes.
        settings: Rendering settings; defaults to `MosaicSettings()`.

    Returns:
        An RGB image of `layout.canvas_size` squared; cells without a reference are black.
    """
    settings = settings or MosaicSettings()
    canvas = Image.new("RGB", (layout.canvas_size, layout.canvas_size))
    cells = assign_cells(len(images), proxy)
    resampling = RESAMPLING[settings.resampling]
    for image, index in zip(images, cells, strict=True):
        if index in layout:
            left, top, right, bottom = layout.cell(index)
            canvas.paste(image.resize((right - left, bottom - top), resampling), (left, top))
    if len(images) == 1 and not settings.mark_single:
        return canvas
    draw = ImageDraw.Draw(canvas)
    width = max(1, round(_LINE_WIDTH_AT_600 * layout.canvas_size / 600))
    for number, (image, image_boxes) in enumerate(zip(images, boxes, strict=True)):
        if number == proxy or cells[number] not in layout:
            continue
        for box in _as_box_list(image_boxes):
            canvas_box = layout.image_to_canvas(box, cells[number], image.size)
            if settings.boxes_from == "cell":  # undo rounding errors: these boxes have integer pixels
                x1, y1, x2, y2 = canvas_box
                canvas_box = round(x1, 6), round(y1, 6), round(x2, 6), round(y2, 6)
            draw.rectangle(_last_pixels(canvas_box), outline=BOX_COLOR, width=width)
    return canvas


def _as_box_list(boxes: Box | Sequence[Box] | None) -> Iterator[Box]:
    """Iterate over one box or several boxes."""
    if boxes is None:
        return
    numbers = [item for item in boxes if not isinstance(item, Sequence)]
    if numbers:
        x1, y1, x2, y2 = numbers
        yield x1, y1, x2, y2
    else:
        yield from (item for item in boxes if isinstance(item, Sequence))


def _last_pixels(box: Box) -> tuple[int, int, int, int]:
    """Convert a box with exclusive corners to Pillow's rectangles, which include the last row and column."""
    x1, y1, x2, y2 = box
    left, top = math.floor(x1), math.floor(y1)
    return left, top, max(left, math.ceil(x2) - 1), max(top, math.ceil(y2) - 1)
