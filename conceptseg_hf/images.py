"""Reading images and masks from whatever a caller has: paths, URLs, bytes, arrays or PIL images of any mode.

Frame "image" of ARCHITECTURE.md starts here: its pixels are those of the image after EXIF rotation.
"""

from __future__ import annotations

import io
import os
import pathlib
import urllib.request
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

ImageInput: TypeAlias = Any
"""A PIL image, an array (H, W) or (H, W, 1, 3 or 4), a path, an http(s) URL, bytes or a binary file."""

URL_TIMEOUT_SECONDS = 30.0
# Foreground level of a grey mask: halfway, so that soft edges and JPEG noise do not count.
_MASK_LEVEL = 128


def load_image(image: ImageInput) -> Image.Image:
    """Reads an image as 8-bit RGB after EXIF rotation.

    Transparent pixels are laid over white. 16-bit values are divided by 257; float values span 0 to 1. A URL
    is fetched only when the caller gives one.

    Args:
        image: See `ImageInput`. Arrays are bool, uint8, uint16, another integer type within 0 to 255, or
            float within 0 to 1.

    Returns:
        A fully loaded PIL image of mode "RGB".

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the input is of an unknown kind or cannot be read as an image.
    """
    picture = _open(image, "image")
    try:
        return _to_rgb(_rotated(picture))
    except (ValueError, OSError, SyntaxError, EOFError, MemoryError) as error:
        raise ValueError(_sentence(f"image {_name(image)} cannot be converted to RGB: {error}")) from error


def load_mask(mask: ImageInput, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a mask: foreground is True.

    A pixel is foreground when its value is not zero; in a mask whose largest value is 128 to 255, when it is at least
    128 (so that soft edges and JPEG noise stay background); in a float mask, when it is at least 0.5. Palette
    masks are read by index, those of black and white by colour; colour masks by their brightest channel.

    Args:
        mask: See `ImageInput`.
        size: (width, height) that the mask must have: that of its image after EXIF rotation.

    Returns:
        A bool array of shape (H, W).

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the mask cannot be read or has another size than its image.
    """
    if _is_array(mask):
        foreground = _array_foreground(_checked_array(mask, "mask"))
    else:
        foreground = _picture_foreground(open_mask(mask))
    if size is not None and foreground.shape != (size[1], size[0]):
        height, width = foreground.shape
        raise ValueError(
            f"mask has {width} x {height} pixels, but its image has {size[0]} x {size[1]}; "
            "give a mask of the image's size."
        )
    return foreground


def open_mask(mask: ImageInput) -> Image.Image:
    """A mask's picture after EXIF rotation, whose values `load_mask` reads; palettes of black and white as grey.

    Args:
        mask: See `ImageInput`, but no array.

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the mask cannot be read.
    """
    picture = _rotated(_open(mask, "mask"))
    if picture.mode == "P" and _has_white(picture):  # in a GIF, white may come first
        return picture.convert("L")
    return picture


def mask_to_image(mask: np.ndarray) -> Image.Image:
    """A bool array (H, W) as an "L" picture of 0 and 255, which `load_mask` reads back."""
    return Image.fromarray(mask.astype(bool).astype(np.uint8) * 255)


def _open(image: ImageInput, what: str) -> Image.Image:
    """Opens and fully decodes an input; `what` names it in errors."""
    if isinstance(image, Image.Image):
        return _decoded(image, image, what)
    if _is_array(image):
        return _array_to_image(_checked_array(image, what))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(image), image, what)
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        if isinstance(path, str) and path.startswith(("http://", "https://")):
            return _decoded(io.BytesIO(_fetch(path, what)), image, what)
        if not pathlib.Path(os.fsdecode(path)).is_file():
            raise FileNotFoundError(f"{what} {_name(image)} is not a file; give the path of an image.")
        return _decoded(path, image, what)
    if hasattr(image, "read"):
        return _decoded(image, image, what)
    raise ValueError(
        f"{what} is a {type(image).__name__}; give a PIL image, an array, a path, a URL or bytes."
    )


def _decoded(source: Any, image: ImageInput, what: str) -> Image.Image:
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        picture.load()  # Pillow is lazy: a truncated file fails only here
    except Image.DecompressionBombError as error:
        raise ValueError(
            _sentence(f"{what} {_name(image)} is too large to be opened safely: {error}")
        ) from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise ValueError(f"{what} {_name(image)} cannot be read; it is damaged or not an image.") from error
    if picture.width == 0 or picture.height == 0:
        raise ValueError(
            f"{what} {_name(image)} has no pixels ({picture.width} x {picture.height}); "
            "give an image with content."
        )
    return picture


def _fetch(url: str, what: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "conceptseg-hf"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, ValueError) as error:
        raise ValueError(_sentence(f"{what} {url!r} cannot be fetched: {error}")) from error


def _rotated(picture: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; unreadable EXIF data counts as none."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(_eight_bit(picture)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def _eight_bit(picture: Image.Image) -> np.ndarray:
    """Grey values of a deep mode as uint8.

    "I;16" is 16-bit, "I" is when a value exceeds 255, "F" spans 0 to 1, or 0 to 255 when a value exceeds 1.
    """
    values = np.nan_to_num(np.asarray(picture).astype(np.float64))
    top = values.max(initial=0.0)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and top > 255.0):
        values = values / 257.0
    elif picture.mode == "F" and top <= 1.0:
        values = values * 255.0
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _is_array(value: Any) -> bool:
    return not isinstance(value, Image.Image) and hasattr(value, "__array__")


def _checked_array(value: Any, what: str) -> np.ndarray:
    """An array of shape (H, W), (H, W, 3) or (H, W, 4) whose values are in a range that has a meaning."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # for example a tensor on an accelerator
        raise ValueError(_sentence(f"{what} cannot be read as an array: {error}")) from error
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(
            f"{what} array has shape {tuple(array.shape)}; "
            "give (H, W), (H, W, 3) or (H, W, 4), channels last."
        )
    if array.size == 0:
        raise ValueError(
            f"{what} array has shape {tuple(array.shape)} and so no pixels; give an array with content."
        )
    kind = array.dtype.kind
    if kind not in "buif":
        raise ValueError(f"{what} array has dtype {array.dtype}; give bool, uint8, uint16 or float.")
    if kind == "f" and not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
        raise ValueError(f"{what} array is float but not within 0 to 1; scale it, or give uint8.")
    if kind in "ui" and array.dtype not in (np.uint8, np.uint16) and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"{what} array is {array.dtype} but not within 0 to 255; give uint8 or uint16.")
    return array


def _array_to_image(array: np.ndarray) -> Image.Image:
    if array.dtype.kind == "f":
        array = np.rint(array * 255.0)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257.0)
    elif array.dtype.kind == "b":
        array = array * 255
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def _picture_foreground(picture: Image.Image) -> np.ndarray:
    mode = picture.mode
    if mode == "LA":
        return _array_foreground(np.asarray(picture.getchannel("L"))) & (
            np.asarray(picture.getchannel("A")) >= _MASK_LEVEL
        )
    if mode in ("1", "L", "P", "F", "RGB", "RGBA") or mode.startswith("I"):
        return _array_foreground(np.asarray(picture))
    return _array_foreground(np.asarray(picture.convert("RGBA" if mode in ("PA", "La", "RGBa") else "RGB")))


def _has_white(picture: Image.Image) -> bool:
    """Whether a palette picture uses greys alone, and a bright one; classes have colours, or no palette at all."""
    palette = np.reshape(picture.getpalette("RGB"), (-1, 3))
    used = palette[[index for index in np.unique(np.asarray(picture)) if index < len(palette)]]
    return bool((used == used[:, :1]).all() and used.max(initial=0) >= _MASK_LEVEL)


def _array_foreground(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        foreground = _array_foreground(array[..., :3].max(axis=-1))
        # A transparent pixel is no foreground, whatever its colour.
        return foreground & _array_foreground(array[..., 3]) if array.shape[-1] == 4 else foreground
    if array.dtype.kind == "b":
        return array.copy()
    if array.dtype.kind == "f":
        return array >= 0.5
    if _MASK_LEVEL <= array.max(initial=0) <= 255:
        return array >= _MASK_LEVEL
    return array != 0


def _name(image: ImageInput) -> str:
    """How an input is called in an error: its path, or what it is."""
    if isinstance(image, (str, os.PathLike)):
        return repr(os.fspath(image))
    if isinstance(image, Image.Image):
        return f"(a PIL image of mode {image.mode})"
    return f"(given as {type(image).__name__})"


def _sentence(text: str) -> str:
    """One line that ends with a full stop."""
    return " ".join(text.split()).rstrip(".") + "."
