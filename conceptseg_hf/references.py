"""Reference images: how they are read, their boxes, and their roles. `mosaic` lays them out.

A reference's boxes are in the "image" frame of that reference (see ARCHITECTURE.md): (x1, y1, x2, y2) with x2 and y2
exclusive.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from .boxes import Box, enclosing_box, mask_to_box
from .images import ImageInput, as_list, load_gray_mask, load_mask, load_oriented_image, describe_input
from .mosaic import (
    MosaicLayout,
    MosaicSettings,
    assign_cells,
    make_layout,
    mask_to_cell_box,
)

Role: TypeAlias = Literal["auto", "support", "proxy"]


@dataclass(frozen=True)
class Reference:
    """An image that shows the concept, with a box or mask around it or without.

    Attributes:
        image: The picture; see `images.ImageInput`.
        mask: Foreground mask of the same size; its extreme foreground pixels become the box. Ignored when
            `box` or `boxes` is given.
        box: (x1, y1, x2, y2) in pixels of `image` after EXIF rotation, x2 and y2 exclusive.
        role: `"support"`: the boxes are shown. `"proxy"`: they are withheld and the VLM must find them, which
            checks its rule. `"auto"`: with two or more boxed references and no explicit proxy, the first
            boxed "auto" reference is the proxy, all others are support.
        boxes: Several boxes instead of one, each as `box`.
    """

    image: ImageInput
    mask: ImageInput | None = None
    box: Sequence[float] | None = None
    role: Role = "auto"
    boxes: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"Reference: role is {self.role!r}; use 'auto', 'support' or 'proxy'.")
        if self.box is not None and self.boxes is not None:
            raise ValueError("Reference: both box and boxes are given; give all of them as boxes.")

    @property
    def is_marked(self) -> bool:
        """Whether it has a mask or a box; not whether they can be used."""
        return self.mask is not None or self.box is not None or self.boxes is not None


@dataclass(frozen=True)
class ResolvedReferences:
    """References after reading.

    Attributes:
        images: RGB images after EXIF rotation.
        boxes: Per image one box in pixels of it, or None; where it has several, the one that encloses them.
        proxy: Index of the proxy query, or None.
        all_boxes: Per image all of its boxes.
    """

    images: tuple[Image.Image, ...]
    boxes: tuple[Box | None, ...]
    proxy: int | None
    all_boxes: tuple[tuple[Box, ...], ...] = ()


def resolve_references(
    references: Sequence[Reference | Mapping[str, Any]],
    canvas_size: int | None = None,
    settings: MosaicSettings | None = None,
) -> ResolvedReferences:
    """Reads references, turns masks into boxes and decides which one is the proxy query.

    Args:
        references: `Reference` objects or mappings with their fields.
        canvas_size: Side of the canvas; needed where `settings` are.
        settings: How they are laid out; None: boxes are those of the masks themselves, and all references are shown.

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
    layout = make_layout(
        len(listed), canvas_size or len(listed), settings
    )  # refuses too many before reading any
    from_cells = settings is not None and settings.boxes_from == "cell"
    given = [_as_reference(reference, index) for index, reference in enumerate(listed)]
    read = []
    for index, reference in enumerate(given):
        try:
            read.append(_read(reference, from_cells))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"reference {index}: {error}") from error
        except ValueError as error:
            raise ValueError(f"reference {index}: {error}") from error
    images, boxes, masks = zip(*read, strict=True)
    # One that is not shown is not withheld either.
    shown = [enclosing_box(found) if index in layout else None for index, found in enumerate(boxes)]
    proxy = find_proxy([reference.role for reference in given], shown)
    cells = assign_cells(len(given), proxy)
    boxes = tuple(
        found if mask is None or cell not in layout else _cell_boxes(mask, layout, cell, image.size) or found
        for image, found, mask, cell in zip(images, boxes, masks, cells, strict=True)
    )
    return ResolvedReferences(images, tuple(map(enclosing_box, boxes)), proxy, boxes)


def read_reference(reference: Reference) -> tuple[Image.Image, Box | None]:
    """A reference's image, RGB and upright, and its box in pixels of it, None where it has none.

    Raises:
        FileNotFoundError: If an image or mask names no file.
        ValueError: If image, mask or box cannot be used.
    """
    image, boxes, _ = _read(reference)
    return image, enclosing_box(boxes)


def _read(
    reference: Reference, with_mask: bool = False
) -> tuple[Image.Image, tuple[Box, ...], Image.Image | None]:
    """A reference's image, RGB and upright, its boxes, and, if asked for, the mask that they are of ("L")."""
    image, orientation = load_oriented_image(reference.image)
    boxes = _reference_boxes(reference, image.size, orientation)
    is_masked = reference.mask is not None and reference.box is None and reference.boxes is None
    mask = load_gray_mask(reference.mask) if with_mask and is_masked else None
    return image, boxes, mask


def _cell_boxes(
    mask: Image.Image, layout: MosaicLayout, cell: int, image_size: tuple[int, int]
) -> tuple[Box, ...]:
    """The box of a mask in its cell, in pixels of the image; none where the mask is too small for the cell."""
    box = mask_to_cell_box(mask, layout.cell(cell))
    return () if box is None else (layout.canvas_to_image(box, cell, image_size),)


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
            f"reference {index} has the fields {sorted(map(str, reference))}; give image, mask, box or boxes, and role."
        ) from error


def _reference_boxes(reference: Reference, image_size: tuple[int, int], orientation: int) -> tuple[Box, ...]:
    if reference.boxes is not None:
        return _checked_boxes(reference.boxes, image_size)
    if reference.box is not None:
        return (_checked_box(reference.box, image_size),)
    if reference.mask is None:
        return ()
    box = mask_to_box(load_mask(reference.mask, image_size, orientation))
    if box is None:
        raise ValueError(no_foreground_message(reference.mask))
    x1, y1, x2, y2 = box
    return ((float(x1), float(y1), float(x2), float(y2)),)


def no_foreground_message(mask: ImageInput) -> str:
    """The sentence about a mask without foreground."""
    name = f" {describe_input(mask)}" if isinstance(mask, (str, os.PathLike)) else ""
    return f"mask{name} has no foreground pixel; give a mask of the concept, or no mask."


def _checked_boxes(boxes: Sequence[Sequence[float]], image_size: tuple[int, int]) -> tuple[Box, ...]:
    """Several boxes, each as `_checked_box`; their places are named in errors."""
    try:
        listed = list(boxes)
    except TypeError as error:
        raise ValueError(f"boxes is {boxes!r}; give a list of boxes (x1, y1, x2, y2).") from error
    if not listed:
        raise ValueError("boxes is empty; give at least one box (x1, y1, x2, y2), or leave boxes out.")
    found = []
    for place, box in enumerate(listed):
        try:
            found.append(_checked_box(box, image_size))
        except ValueError as error:
            raise ValueError(f"box {place} of {len(listed)}: {error}") from error
    return tuple(found)


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


__all__ = [
    "Reference",
    "ResolvedReferences",
    "Role",
    "find_proxy",
    "no_foreground_message",
    "read_reference",
    "resolve_references",
    "usable_references",
]
