"""Checks that a mask fits its image: its size, its EXIF orientation, and that it is not a photo."""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

SWAPS_SIDES = 5
"""Width and height are swapped by EXIF orientations from this value on."""

# `looks_like_photo`: number of sampled rows, threshold on the fraction of equal neighbors, maximum levels of a mask.
_SAMPLED_ROWS, _MIN_EQUAL, _MASK_LEVELS = 64, 0.4, 32
# `is_similar_size`: tolerance of each side in pixels, and of the aspect ratio.
_PIXELS, _RATIO = 2, 0.01


def check_mask_frame(
    what: str,
    mask_size: tuple[int, int],
    mask_orientation: int,
    image_size: tuple[int, int],
    image_orientation: int,
) -> None:
    """Check whether a mask matches the stored pixels of an image instead of the image after EXIF rotation.

    If the size of the mask reveals this, an error is raised. If it does not (mirrored or upside-down images, square
    images), the mask is assumed to match the image after EXIF rotation, and a warning is issued.

    Args:
        what: Name of the mask in messages.
        mask_size: (width, height) of the mask after EXIF rotation.
        mask_orientation: EXIF orientation of the mask. A mask with an orientation matches the rotated image.
        image_size: (width, height) of the image after EXIF rotation.
        image_orientation: EXIF orientation of the image.

    Raises:
        ValueError: If the mask has the size of the stored image, with width and height swapped.
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
            f"{what} has {mask_size[0]} x {mask_size[1]} pixels, but its image has {width} x {height} after EXIF "
            f"orientation {image_orientation} is applied: the mask matches the stored pixels; rotate the mask like "
            "the image, or remove the orientation from the image."
        )
    if fits_stored and fits_upright:
        warnings.warn(
            f"{what} is assumed to match its image after EXIF orientation {image_orientation} is applied; if it was "
            "drawn on the stored pixels, apply the same orientation to the mask.",
            stacklevel=3,
        )


def describe_size_mismatch(what: str, mask_size: tuple[int, int], image_size: tuple[int, int]) -> str:
    """Return the error message for a mask with a different size than its image."""
    remedy = "give a mask of the image's size"
    if tuple(mask_size) == (image_size[1], image_size[0]):
        remedy = "width and height are swapped, as before EXIF rotation; give a mask of the rotated image"
    return (
        f"{what} has {mask_size[0]} x {mask_size[1]} pixels, but its image has {image_size[0]} x {image_size[1]}; "
        f"{remedy}."
    )


def is_similar_size(mask_size: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Whether a mask of another size fits the image up to rounding or scale, so that it may be resized.

    This is the case if both sides differ by at most 2 pixels, or the aspect ratios by at most 1 %.
    """
    (width, height), (image_width, image_height) = mask_size, image_size
    if max(abs(width - image_width), abs(height - image_height)) <= _PIXELS:
        return True
    return abs(width * image_height / (height * image_width) - 1) <= _RATIO


def looks_like_photo(image: Image.Image) -> bool:
    """Whether a mask is actually a photo: it has many levels and few equal neighboring pixels.

    In a mask, more than 90 % of the neighboring pixels are equal (more than 60 % with soft edges or JPEG compression),
    in a photo less than 40 %.
    """
    one_channel = image.mode in ("1", "L", "P", "F") or image.mode.startswith("I")
    values = np.asarray(image if one_channel else image.convert("RGB"))
    values = values if one_channel else values.max(axis=-1)
    values = values[:: max(1, values.shape[0] // _SAMPLED_ROWS)]
    pairs = values[:, 1:] == values[:, :-1]
    return pairs.size > 0 and bool(pairs.mean() < _MIN_EQUAL) and len(np.unique(values)) > _MASK_LEVELS
