"""Reference images, their boxes and roles. The `mosaic` module lays them out.

Boxes are in the "image" frame of their reference (see ARCHITECTURE.md): (x1, y1, x2, y2) with exclusive x2 and y2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from .boxes import Box, enclosing_box, mask_to_box
from .images import ImageInput, as_list, describe_input, load_gray_mask, load_mask, load_oriented_image
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
    """An image of the concept, optionally with boxes or a mask.

    Attributes:
        image: The image; see `images.ImageInput`.
        mask: Foreground mask of the same size, from which the bounding box is computed. Ignored if `box` or `boxes` is
            given.
        box: (x1, y1, x2, y2) in pixels of `image` after EXIF rotation, x2 and y2 exclusive.
        role: `"support"`: the boxes are shown to the VLM. `"proxy"`: the boxes are withheld, and the VLM must predict
            them to check its rule. `"auto"`: if there are at least two references with boxes and no explicit proxy,
            the first "auto" reference with boxes becomes the proxy; all others are support references.
        boxes: Several boxes, as an alternative to `box`.
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
            raise ValueError("Reference: both box and boxes are given; pass all boxes as boxes.")

    @property
    def is_marked(self) -> bool:
        """Whether the reference has a mask or boxes, regardless of whether they are valid."""
        return self.mask is not None or self.box is not None or self.boxes is not None


@dataclass(frozen=True)
class ResolvedReferences:
    """References with loaded images and computed boxes.

    Attributes:
        images: RGB images after EXIF rotation.
        boxes: For each image one box in pixels of the image, which encloses all of its boxes, or None.
        proxy: Index of the proxy query, or None.
        all_boxes: All boxes of each image.
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
    """Read references, compute boxes from masks and choose the proxy query.

    Args:
        references: `Reference` objects or mappings with their fields.
        canvas_size: Side of the canvas; required with `settings`.
        settings: Layout of the references; None to compute boxes at the masks' resolution and show all references.

    Raises:
        FileNotFoundError: If an image or mask does not exist.
        ValueError: If a reference is invalid (the message contains its index), or there are more than nine references,
            more than one proxy, or a proxy without other references.
    """
    parsed = _as_references(references)
    if not parsed:
        return ResolvedReferences((), (), None)
    # Raises an error for too many references before any of them is read.
    layout = make_layout(len(parsed), canvas_size or len(parsed), settings)
    from_cells = settings is not None and settings.boxes_from == "cell"
    images, boxes, masks = zip(*_read_all(parsed, from_cells), strict=True)
    # A reference that is not shown cannot be the proxy query.
    shown = [enclosing_box(all_boxes) if index in layout else None for index, all_boxes in enumerate(boxes)]
    proxy = find_proxy([reference.role for reference in parsed], shown)
    cells = assign_cells(len(parsed), proxy)
    boxes = tuple(
        all_boxes
        if mask is None or cell not in layout
        else _cell_boxes(mask, layout, cell, image.size) or all_boxes
        for image, all_boxes, mask, cell in zip(images, boxes, masks, cells, strict=True)
    )
    return ResolvedReferences(images, tuple(map(enclosing_box, boxes)), proxy, boxes)


def load_references(
    references: Sequence[Reference | Mapping[str, Any]],
) -> list[tuple[Image.Image, tuple[Box, ...]]]:
    """Read any number of references.

    Returns:
        For each reference its RGB image after EXIF rotation, and its boxes in pixels of the image.

    Raises:
        FileNotFoundError: If an image or mask does not exist.
        ValueError: If a reference is invalid (the message contains its index).
    """
    return [(image, boxes) for image, boxes, _ in _read_all(_as_references(references))]


def read_reference(reference: Reference) -> tuple[Image.Image, Box | None]:
    """Read a reference; return its RGB image after EXIF rotation and its box in pixels of the image, if any.

    Raises:
        FileNotFoundError: If the image or mask does not exist.
        ValueError: If the image, mask or box is invalid.
    """
    image, boxes, _ = _read(reference)
    return image, enclosing_box(boxes)


def _as_references(references: Sequence[Reference | Mapping[str, Any]]) -> list[Reference]:
    items = as_list(references)
    if items is None:
        raise ValueError(f"references is a {type(references).__name__}; pass a list of Reference objects.")
    return [_as_reference(item, index) for index, item in enumerate(items)]


def _read_all(
    references: Sequence[Reference], with_mask: bool = False
) -> list[tuple[Image.Image, tuple[Box, ...], Image.Image | None]]:
    """Return the results of `_read`; errors contain the index of the reference."""
    loaded = []
    for index, reference in enumerate(references):
        try:
            loaded.append(_read(reference, with_mask))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"reference {index}: {error}") from error
        except ValueError as error:
            raise ValueError(f"reference {index}: {error}") from error
    return loaded


def _read(
    reference: Reference, with_mask: bool = False
) -> tuple[Image.Image, tuple[Box, ...], Image.Image | None]:
    """Return a reference's RGB image after EXIF rotation, its boxes, and optionally the mask ("L") of the boxes."""
    image, orientation = load_oriented_image(reference.image)
    boxes = _reference_boxes(reference, image.size, orientation)
    is_masked = reference.mask is not None and reference.box is None and reference.boxes is None
    mask = load_gray_mask(reference.mask) if with_mask and is_masked else None
    return image, boxes, mask


def _cell_boxes(
    mask: Image.Image, layout: MosaicLayout, cell: int, image_size: tuple[int, int]
) -> tuple[Box, ...]:
    """Return the box of a mask in its cell, in pixels of the image; empty if the mask vanishes in the cell."""
    box = mask_to_cell_box(mask, layout.cell(cell))
    return () if box is None else (layout.canvas_to_image(box, cell, image_size),)


def usable_references(
    references: Sequence[Reference | Mapping[str, Any]],
) -> tuple[list[Reference], list[str]]:
    """Return the references that can be read, and an error message for each of the others.

    If a proxy query is the only reference left, its role is set to "auto".
    """
    usable, faults = [], []
    for index, item in enumerate(references):
        try:
            reference = _as_reference(item, index)
            read_reference(reference)
        except (OSError, ValueError) as error:
            faults.append(str(error))
        else:
            usable.append(reference)
    if faults and len(usable) == 1:
        usable = [replace(usable[0], role="auto")]
    return usable, faults


def find_proxy(roles: Sequence[Role], boxes: Sequence[Box | None]) -> int | None:
    """Return the index of the proxy query according to `Reference.role`, or None.

    Raises:
        ValueError: If more than one role is "proxy", or the only reference is a proxy.
    """
    explicit = [index for index, role in enumerate(roles) if role == "proxy"]
    if len(explicit) > 1:
        raise ValueError(
            f"references {explicit} all have the role 'proxy', but at most one is allowed; set the others to 'support'."
        )
    if explicit and len(roles) == 1:
        raise ValueError(
            "reference 0 is a proxy query without support references; add a reference, or set its role to 'support'."
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
            f"reference {index} is a {type(reference).__name__}; pass Reference(image, mask=..., box=...)."
        )
    try:
        return Reference(**reference)
    except TypeError as error:
        raise ValueError(
            f"reference {index} has the fields {sorted(map(str, reference))}; use image, mask, box or boxes, and role."
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
    """Return the error message for a mask without foreground."""
    name = f" {describe_input(mask)}" if isinstance(mask, (str, os.PathLike)) else ""
    return f"mask{name} has no foreground pixel; use a mask of the concept, or no mask."


def _checked_boxes(boxes: Sequence[Sequence[float]], image_size: tuple[int, int]) -> tuple[Box, ...]:
    """Validate boxes with `_checked_box`; error messages contain the index of the box."""
    try:
        box_list = list(boxes)
    except TypeError as error:
        raise ValueError(f"boxes is {boxes!r}; pass a list of boxes (x1, y1, x2, y2).") from error
    if not box_list:
        raise ValueError("boxes is empty; pass at least one box (x1, y1, x2, y2), or omit boxes.")
    checked = []
    for index, box in enumerate(box_list):
        try:
            checked.append(_checked_box(box, image_size))
        except ValueError as error:
            raise ValueError(f"box {index} of {len(box_list)}: {error}") from error
    return tuple(checked)


def _checked_box(box: Sequence[float], image_size: tuple[int, int]) -> Box:
    """Validate a box and clip it to its image."""
    try:
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"box is {box!r}; use four numbers (x1, y1, x2, y2) in pixels of the image."
        ) from error
    width, height = image_size
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x1 >= x2 or y1 >= y2:
        raise ValueError(
            f"box is {(x1, y1, x2, y2)}; use (x1, y1, x2, y2) in pixels with x1 < x2 and y1 < y2."
        )
    # (0, 0, 1, 1) is accepted as the box of a single pixel.
    if max(width, height) > 1 and min(x1, y1) >= 0 and max(x2, y2) <= 1 and {x1, y1, x2, y2} - {0.0, 1.0}:
        raise ValueError(
            f"box {(x1, y1, x2, y2)} lies within one pixel of its image of {width} x {height} pixels and appears to be "
            "normalized; use pixel coordinates."
        )
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise ValueError(
            f"box {(x1, y1, x2, y2)} lies outside its image of {width} x {height} pixels; "
            "use pixel coordinates of that image."
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
