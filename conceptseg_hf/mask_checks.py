"""Whether a mask belongs to its image: its size, its EXIF frame, and whether it is a mask at all."""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

SWAPS_SIDES = 5
"""From this EXIF orientation on, width and height are swapped."""

# `looks_like_photo`: rows that are looked at, the share of equal neighbors, and the most levels of a mask.
_TRIED_ROWS, _FLAT, _MASK_LEVELS = 64, 0.4, 32
# `is_similar_size`: in pixels on each side, or in the aspect ratio.
_PIXELS, _RATIO = 2, 0.01


def check_mask_frame(
    what: str,
    mask_size: tuple[int, int],
    mask_orientation: int,
    image_size: tuple[int, int],
    image_orientation: int,
) -> None:
    """Finds out whether a mask may be of the stored pixels of an image that EXIF data rotates or mirrors.

    Where the sides tell, that is an error. Where they do not (mirrored and upside-down images, squares), the mask is
    taken to be of the upright image, and a warning says so: nothing in the files tells which one is meant.

    Args:
        what: Names the mask.
        mask_size: (width, height) of the mask, upright.
        mask_orientation: EXIF orientation of the mask itself; one that has its own is of the upright image.
        image_size: (width, height) of the image, upright.
        image_orientation: EXIF orientation of the image.

    Raises:
        ValueError: If the mask has the sides of the stored image, swapped against those of the upright one.
    """
    if image_orientation == 1 or mask_orientation != 1:
        return
    mask_size, (width, height) = (mask_size[0], mask_size[1]), image_size
    stored = (height, width) if image_orientation >= SWAPS_SIDES else (width, height)
    if mask_size == (width, height) != stored:
        return
    fits_upright = is_similar_size(mask_size, image_size)
    fits_stored = is_similar_size(mask_size, stored)
    if fits_stored and (mask_size == stored != (width, height) or not fits_upright):
        raise ValueError(
            f"{what} has {mask_size[0]} x {mask_size[1]} pixels, but its image has {width} x {height} after the "
            f"rotation of its EXIF orientation {image_orientation}: the mask is of the pixels as they are stored; "
            "rotate it as the image is shown, or remove the orientation from the image."
        )
    if fits_stored and fits_upright:
        warnings.warn(
            f"{what} is taken to be of its image as it is shown, after the rotation of its EXIF orientation "
            f"{image_orientation}; if it was drawn on the pixels as they are stored, apply that orientation to the "
            "mask, too.",
            stacklevel=3,
        )


def describe_size_mismatch(what: str, mask_size: tuple[int, int], image_size: tuple[int, int]) -> str:
    """The sentence about a mask of another size than its image."""
    remedy = "give a mask of the image's size"
    if tuple(mask_size) == (image_size[1], image_size[0]):
        remedy = "its sides are swapped, as before an EXIF rotation; give a mask of the image as it is shown"
    return (
        f"{what} has {mask_size[0]} x {mask_size[1]} pixels, but its image has {image_size[0]} x {image_size[1]}; "
        f"{remedy}."
    )


def is_similar_size(mask_size: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Whether a mask of another size is the image's but for rounding or scale, so that it may be resized.

    So it is where both sides differ by no more than 2 pixels, or the aspect ratios by no more than 1 %.
    """
    (width, height), (image_width, image_height) = mask_size, image_size
    if max(abs(width - image_width), abs(height - image_height)) <= _PIXELS:
        return True
    return abs(width * image_height / (height * image_width) - 1) <= _RATIO


def looks_like_photo(picture: Image.Image) -> bool:
    """Whether what should be a mask is a photograph: many levels, and hardly two neighbors alike.

    Masks are flat: of neighboring pixels more than 9 in 10 are equal, in soft ones and JPEG files more than 6 in 10; in
    photographs fewer than 4 in 10 are.
    """
    one_channel = picture.mode in ("1", "L", "P", "F") or picture.mode.startswith("I")
    values = np.asarray(picture if one_channel else picture.convert("RGB"))
    values = values if one_channel else values.max(axis=-1)
    values = values[:: max(1, values.shape[0] // _TRIED_ROWS)]
    pairs = values[:, 1:] == values[:, :-1]
    return pairs.size > 0 and bool(pairs.mean() < _FLAT) and len(np.unique(values)) > _MASK_LEVELS
