"""Reading images and masks from whatever a caller has: paths, URLs, bytes, arrays or PIL images of any mode.

Frame "image" of ARCHITECTURE.md starts here: its pixels are those of the image after EXIF rotation.
"""

from __future__ import annotations

import io
import os
import pathlib
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .image_formats import explain_unreadable, is_heic, read_head, register_heic_reader
from .mask_checks import SWAPS_SIDES, check_mask_frame, describe_size_mismatch

ImageInput: TypeAlias = Any
"""A PIL image, an array (H, W) or (H, W, 1, 3 or 4), a path, an http(s) URL, bytes or a binary file."""

URL_TIMEOUT_SECONDS = 30.0
# Foreground level of a grey mask: halfway, so that soft edges and JPEG noise do not count.
_MASK_LEVEL = 128
_ORIENTATION = 0x0112  # EXIF tag


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
    return load_oriented_image(image)[0]


def load_oriented_image(image: ImageInput) -> tuple[Image.Image, int]:
    """As `load_image`, with the EXIF orientation that was applied: 1 for none, 2 to 8 as EXIF counts."""
    picture, orientation = _rotated(*_open(image, "image"))
    try:
        return _to_rgb(picture), orientation
    except (ValueError, OSError, SyntaxError, EOFError, MemoryError) as error:
        raise ValueError(_sentence(f"image {describe_input(image)} cannot be converted to RGB: {error}")) from error


def read_header(path: str | os.PathLike) -> tuple[tuple[int, int], int]:
    """Size (width, height) after EXIF rotation and EXIF orientation of an image file; pixels are not decoded.

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the file is no image.
    """
    _check_is_file(path, "image")
    with _opened(path, path, "image") as picture:
        orientation = _orientation_of(picture)
        if picture.format == "TIFF":  # which Pillow turns itself
            picture.load()
            return picture.size, orientation
        width, height = picture.size
        return ((height, width) if orientation >= SWAPS_SIDES else (width, height)), orientation


def try_image(path: str | os.PathLike) -> tuple[tuple[int, int], int]:
    """As `read_header`, of a file that is read to its end so that damage is found (JPEG: at an eighth of its size).

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the file is no image, or damaged.
    """
    header = read_header(path)
    with _opened(path, path, "image") as picture:
        picture.draft("RGB", (1, 1))
        _decoded(picture, path, "image")
    return header


def as_list(inputs: Any) -> list[Any] | None:
    """Several inputs as a list; None if it is a single one.

    Several are any sequence but text and bytes, and one-dimensional arrays, pandas Series and the like that hold paths
    or objects. An array of numbers is one image.
    """
    if isinstance(inputs, (str, bytes, bytearray, memoryview, os.PathLike, Mapping, Image.Image)):
        return None
    if isinstance(inputs, Sequence):
        return list(inputs)
    try:
        array = np.asarray(inputs) if hasattr(inputs, "__array__") else None
    except (TypeError, ValueError, RuntimeError):  # for example a tensor on an accelerator
        return None
    if array is None or array.ndim != 1 or array.dtype.kind not in "OUS":
        return None
    return list(array)


def is_file(path: str | bytes | os.PathLike) -> bool:
    """Whether a path names a file; False also of one that is longer than a name can be, or cannot be looked at."""
    try:
        return pathlib.Path(os.fsdecode(path)).is_file()
    except (OSError, ValueError):
        return False


def load_mask(mask: ImageInput, size: tuple[int, int] | None = None, orientation: int = 1) -> np.ndarray:
    """Reads a mask: foreground is True.

    A pixel is foreground when its value is not zero; in a mask whose largest value is 128 to 255, when it is at least
    128 (so that soft edges and JPEG noise stay background); in a float mask, when it is at least 0.5. Palette
    masks are read by index, those of black and white by color; color masks by their brightest channel.

    Args:
        mask: See `ImageInput`.
        size: (width, height) that the mask must have: that of its image after EXIF rotation.
        orientation: EXIF orientation of that image, where it is known; see `check_mask_frame`.

    Returns:
        A bool array of shape (H, W).

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the mask cannot be read or has another size than its image.
    """
    own_orientation = 1
    if _is_array(mask):
        foreground = _array_foreground(_checked_array(mask, "mask"))
    else:
        picture, own_orientation = open_oriented_mask(mask)
        foreground = image_foreground(picture)
    if size is not None:
        found = foreground.shape[::-1]
        name = f" {describe_input(mask)}" if isinstance(mask, (str, os.PathLike)) else ""
        check_mask_frame(f"mask{name}", found, own_orientation, size, orientation)
        if found != tuple(size):
            raise ValueError(describe_size_mismatch(f"mask{name}", found, size))
    return foreground


def load_gray_mask(mask: ImageInput) -> Image.Image:
    """A mask with its soft edges, "L": the grey values of one that is stored so, else 255 in the foreground.

    Args:
        mask: See `ImageInput`.

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the mask cannot be read.
    """
    if _is_array(mask):
        array = _checked_array(mask, "mask")
        grey = array if array.ndim == 2 else None
        foreground = _array_foreground(array)
    else:
        picture = open_oriented_mask(mask)[0]
        grey = np.asarray(picture) if picture.mode == "L" else None
        foreground = image_foreground(picture)
    if grey is not None and grey.dtype.kind == "f":
        return Image.fromarray(np.rint(grey * 255.0).astype(np.uint8))
    # A mask without a value of 128 or more is one of labels: see `load_mask`.
    if grey is not None and grey.dtype == np.uint8 and grey.max(initial=0) >= _MASK_LEVEL:
        return Image.fromarray(np.ascontiguousarray(grey))
    return mask_to_image(foreground)


def open_mask(mask: ImageInput) -> Image.Image:
    """A mask's picture after EXIF rotation, whose values `load_mask` reads; palettes of black and white as grey.

    Args:
        mask: See `ImageInput`, but no array.

    Raises:
        FileNotFoundError: If a path names no file.
        ValueError: If the mask cannot be read.
    """
    return open_oriented_mask(mask)[0]


def open_oriented_mask(mask: ImageInput) -> tuple[Image.Image, int]:
    """As `open_mask`, with the EXIF orientation that was applied."""
    picture, orientation = _rotated(*_open(mask, "mask"))
    if picture.mode == "P" and _has_white(picture):  # in a GIF, white may come first
        picture = picture.convert("L")
    return picture, orientation


def mask_to_image(mask: np.ndarray) -> Image.Image:
    """A bool array (H, W) as an "L" picture of 0 and 255, which `load_mask` reads back."""
    return Image.fromarray(mask.astype(bool).astype(np.uint8) * 255)


def _open(image: ImageInput, what: str) -> tuple[Image.Image, int]:
    """Opens and fully decodes an input, and returns its EXIF orientation; `what` names it in errors."""
    if isinstance(image, Image.Image):
        return _decoded(image, image, what)
    if isinstance(image, np.ndarray) and image.ndim == 0 and image.dtype.kind in "OUS":
        image = image.item()  # an array that is one path
    if _is_array(image):
        return _array_to_image(_checked_array(image, what)), 1
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(image), image, what)
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        if isinstance(path, str) and path.startswith(("http://", "https://")):
            return _decoded(io.BytesIO(_fetch(path, what)), image, what)
        _check_is_file(image, what)
        return _decoded(path, image, what)
    if hasattr(image, "read"):
        return _decoded(image, image, what)
    raise ValueError(
        f"{what} is a {type(image).__name__}; give a PIL image, an array, a path, a URL or bytes."
    )


def _check_is_file(path: str | os.PathLike, what: str) -> None:
    if not is_file(path):
        raise FileNotFoundError(f"{what} {describe_input(path)} is not a file; give the path of an image.")


def _decoded(source: Any, image: ImageInput, what: str) -> tuple[Image.Image, int]:
    picture = source if isinstance(source, Image.Image) else _opened(source, image, what)
    try:
        orientation = _orientation_of(picture)  # of a TIFF, Pillow applies and forgets it below
        picture.load()  # Pillow is lazy: a truncated file fails only here
    except Exception as error:  # decoders raise almost anything on damaged files
        if picture is not source:
            picture.close()
        raise _damaged(image, what) from error
    if picture.width == 0 or picture.height == 0:
        raise ValueError(
            f"{what} {describe_input(image)} has no pixels ({picture.width} x {picture.height}); "
            "give an image with content."
        )
    return picture, orientation


def _opened(source: Any, image: ImageInput, what: str) -> Image.Image:
    """A picture whose pixels are not read yet."""
    try:
        return Image.open(source)
    except Image.DecompressionBombError as error:
        raise ValueError(
            _sentence(f"{what} {describe_input(image)} is too large to be opened safely: {error}")
        ) from error
    except UnidentifiedImageError as error:
        head = read_head(source if hasattr(source, "read") else os.fspath(source))
        if is_heic(head) and register_heic_reader():
            return _opened_heic(source, image, what)
        reason = explain_unreadable(head)
        if reason is None:
            raise _damaged(image, what) from error
        raise ValueError(f"{what} {describe_input(image)} {reason}.") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise _damaged(image, what) from error


def _opened_heic(source: Any, image: ImageInput, what: str) -> Image.Image:
    if hasattr(source, "read"):
        source.seek(0)
    try:
        return Image.open(source)
    except Exception as error:
        raise _damaged(image, what) from error


def _damaged(image: ImageInput, what: str) -> ValueError:
    return ValueError(f"{what} {describe_input(image)} cannot be read; it is damaged or not an image.")


def _fetch(url: str, what: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "conceptseg-hf"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, ValueError) as error:
        raise ValueError(_sentence(f"{what} {url!r} cannot be fetched: {error}")) from error


def _rotated(picture: Image.Image, orientation: int) -> tuple[Image.Image, int]:
    """Applies the EXIF orientation, and returns which it is; unreadable EXIF data counts as none."""
    try:
        return ImageOps.exif_transpose(picture), orientation
    except Exception:
        return picture, 1


def _orientation_of(picture: Image.Image) -> int:
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # of whatever is in that block
        return 1
    return orientation if orientation in range(2, 9) else 1


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
    # Text and bytes of NumPy are arrays by their interface, and paths or files by their meaning.
    others = (Image.Image, str, bytes, os.PathLike)
    return not isinstance(value, others) and hasattr(value, "__array__")


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


def image_foreground(picture: Image.Image) -> np.ndarray:
    """The foreground of a picture that `open_mask` returns, (H, W) bool; see `load_mask`."""
    mode = picture.mode
    if mode == "LA":
        return _array_foreground(np.asarray(picture.getchannel("L"))) & (
            np.asarray(picture.getchannel("A")) >= _MASK_LEVEL
        )
    if mode in ("1", "L", "P", "F", "RGB", "RGBA") or mode.startswith("I"):
        return _array_foreground(np.asarray(picture))
    return _array_foreground(np.asarray(picture.convert("RGBA" if mode in ("PA", "La", "RGBa") else "RGB")))


def _has_white(picture: Image.Image) -> bool:
    """Whether a palette picture uses greys alone, and a bright one; classes have colors, or no palette at all."""
    palette = np.reshape(picture.getpalette("RGB") or [], (-1, 3))
    used = palette[[index for index in np.unique(np.asarray(picture)) if index < len(palette)]]
    return bool((used == used[:, :1]).all() and used.max(initial=0) >= _MASK_LEVEL)


def _array_foreground(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        foreground = _array_foreground(array[..., :3].max(axis=-1))
        # A transparent pixel is no foreground, whatever its color.
        return foreground & _array_foreground(array[..., 3]) if array.shape[-1] == 4 else foreground
    if array.dtype.kind == "b":
        return array.copy()
    if array.dtype.kind == "f":
        return array >= 0.5
    if _MASK_LEVEL <= array.max(initial=0) <= 255:
        return array >= _MASK_LEVEL
    return array != 0


def describe_input(image: ImageInput) -> str:
    """How an input is called in an error: its path, or what it is."""
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        return repr(str(path) if isinstance(path, str) else path)
    if isinstance(image, Image.Image):
        return f"(a PIL image of mode {image.mode})"
    return f"(given as {type(image).__name__})"


def _sentence(text: str) -> str:
    """One line that ends with a full stop."""
    return " ".join(text.split()).rstrip(".") + "."
