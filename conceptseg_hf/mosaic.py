"""The K x K mosaic on which the VLM sees references: its settings, its geometry, and how it is drawn.

`MosaicLayout` owns the "canvas" frame of ARCHITECTURE.md. Boxes are (x1, y1, x2, y2) with x2 and y2 exclusive,
whatever `MosaicSettings.corners` says: that is about how boxes are written in the text.
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
_LINE_WIDTH_AT_600 = 2  # the released mosaic: lines of 2 pixels on a canvas of 600

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""Pillow's filters by the names that settings use."""

_CHOICES = {
    "resampling": tuple(RESAMPLING),
    "boxes_from": ("image", "cell"),
    "corners": ("exclusive", "inclusive"),
    "several_boxes": ("best", "enclosing"),
}


@dataclass(frozen=True)
class MosaicSettings:
    """How references are laid out, and how their boxes are found, written and checked.

    Attributes:
        grid: Cells per side where there are two references or more, 2 or 3; references for which no cell is left, the
            last ones, are not shown. None: as few cells as hold them all. One reference fills the canvas in any case.
        resampling: How references are resized: `"bicubic"` or `"bilinear"`.
        boxes_from: `"image"`: the box of a mask is that of its foreground pixels. `"cell"`: that of the pixels that
            are not zero once the mask is resized (bilinear) to its cell, so that it has whole canvas pixels.
        corners: In the text a box ends behind its last canvas pixel (`"exclusive"`) or on it (`"inclusive"`).
        mark_single: Whether the box of a reference without company is drawn.
        several_boxes: What the check of a proxy query with several boxes is compared with: the one it fits best
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
        """The settings as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MosaicSettings:
        """The inverse of `to_dict`; what is left out has its default.

        Raises:
            ValueError: If a field is unknown, or a value cannot be used.
        """
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in data if name not in names]:
            raise ValueError(f"mosaic has the field {unknown[0]!r}; use some of {', '.join(names)}.")
        return cls(**data)


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

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self.grid**2

    def cell(self, index: int) -> tuple[int, int, int, int]:
        """The cell's rectangle on the canvas, in whole canvas pixels."""
        if index not in self:
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


def make_layout(count: int, canvas_size: int, settings: MosaicSettings | None = None) -> MosaicLayout:
    """The mosaic of `count` references.

    Raises:
        ValueError: If there are no references or more than nine.
    """
    grid = grid_size(count)
    if settings is not None and settings.grid is not None and count > 1:
        grid = settings.grid
    return MosaicLayout(grid, canvas_size)


def assign_cells(count: int, proxy: int | None) -> tuple[int, ...]:
    """The cell of each reference: the proxy query in cell 0 (top left), the others following in order."""
    if proxy is None:
        return tuple(range(count))
    return tuple(0 if index == proxy else index + (index < proxy) for index in range(count))


def mask_to_cell_box(mask: Image.Image, cell: tuple[int, int, int, int]) -> Box | None:
    """The box of what is not zero in a mask that is resized (bilinear) to its cell.

    Args:
        mask: "L".
        cell: The cell's rectangle on the canvas.

    Returns:
        The box in whole canvas pixels; None where nothing is left of the mask.
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
    """Paints references on the canvas, each stretched to its cell, and draws the support boxes in red.

    Args:
        images: RGB images.
        boxes: Per image a box in pixels of it, several, or None.
        layout: The grid and the size of the canvas.
        proxy: Index of the proxy query: it lies in cell 0 and its boxes are not drawn.
        settings: How to draw; the defaults of `MosaicSettings` if there are none.

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
    for number, (image, given) in enumerate(zip(images, boxes, strict=True)):
        if number == proxy or cells[number] not in layout:
            continue
        for box in _listed(given):
            canvas_box = layout.image_to_canvas(box, cells[number], image.size)
            if settings.boxes_from == "cell":  # whole pixels, but for the rounding of the way there and back
                x1, y1, x2, y2 = canvas_box
                canvas_box = round(x1, 6), round(y1, 6), round(x2, 6), round(y2, 6)
            draw.rectangle(_last_pixels(canvas_box), outline=BOX_COLOR, width=width)
    return canvas


def _listed(boxes: Box | Sequence[Box] | None) -> Iterator[Box]:
    """One box or several as several."""
    if boxes is None:
        return
    numbers = [part for part in boxes if not isinstance(part, Sequence)]
    if numbers:
        x1, y1, x2, y2 = numbers
        yield x1, y1, x2, y2
    else:
        yield from (part for part in boxes if isinstance(part, Sequence))


def _last_pixels(box: Box) -> tuple[int, int, int, int]:
    """Pillow's rectangle includes its last row and column, our boxes do not."""
    x1, y1, x2, y2 = box
    left, top = math.floor(x1), math.floor(y1)
    return left, top, max(left, math.ceil(x2) - 1), max(top, math.ceil(y2) - 1)
