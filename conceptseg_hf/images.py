"""Loading of images and masks from paths, URLs, bytes, arrays or PIL images of any mode.

Coordinates in the frame "image" (see ARCHITECTURE.md) are pixels of the loaded image, after EXIF rotation.
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
# Foreground threshold of a gray mask: halfway, so that soft edges and JPEG noise count as background.
_MASK_LEVEL = 128
_ORIENTATION = 0x0112  # EXIF tag


def load_image(image: ImageInput) -> Image.Image:
    """Load an image as 8-bit RGB after EXIF rotation.

    Transparent pixels are blended with white. 16-bit values are divided by 257; float values range from 0 to 1. The
    network is accessed only if the input is a URL.

    Args:
        image: See `ImageInput`. Arrays are bool, uint8, uint16, another integer type within 0 to 255, or
            float within 0 to 1.

    Returns:
        A fully loaded PIL image of mode "RGB".

    Raises:
        FileNotFoundError: If a path does not exist or is not a file.
        ValueError: If the input has an unsupported type or cannot be read as an image.
    """
    return load_oriented_image(image)[0]


def load_oriented_image(image: ImageInput) -> tuple[Image.Image, int]:
    """Load an image like `load_image`, and also return the EXIF orientation that was applied: 1 (none) to 8."""
    opened, orientation = _rotate(*_open(image, "image"))
    try:
        return _to_rgb(opened), orientation
    except (ValueError, OSError, SyntaxError, EOFError, MemoryError) as error:
        raise ValueError(
            _sentence(f"image {describe_input(image)} cannot be converted to RGB: {error}")
        ) from error


def read_header(path: str | os.PathLike) -> tuple[tuple[int, int], int]:
    """Return the size (width, height) after EXIF rotation and the EXIF orientation, without decoding the pixels.

    Raises:
        FileNotFoundError: If a path does not exist or is not a file.
        ValueError: If the file is not an image.
    """
    _check_is_file(path, "image")
    with _open_lazily(path, path, "image") as image:
        orientation = _read_orientation(image)
        if image.format == "TIFF":  # Pillow rotates TIFF images while loading them
            image.load()
            return image.size, orientation
        width, height = image.size
        return ((height, width) if orientation >= SWAPS_SIDES else (width, height)), orientation


def try_image(path: str | os.PathLike) -> tuple[tuple[int, int], int]:
    """Read the header like `read_header` and decode the file to detect damage (JPEG: at an eighth of its size).

    Raises:
        FileNotFoundError: If a path does not exist or is not a file.
        ValueError: If the file is not an image or is damaged.
    """
    header = read_header(path)
    with _open_lazily(path, path, "image") as image:
        image.draft("RGB", (1, 1))
        _decode(image, path, "image")
    return header


def as_list(inputs: Any) -> list[Any] | None:
    """Return a batch of inputs as a list; None for a single input.

    A batch is any sequence except strings and bytes, or a one-dimensional array (pandas Series and similar) of paths
    or objects. A numeric array is a single image.
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
    """Whether a path is an existing file; False for invalid, too long and inaccessible paths."""
    try:
        return pathlib.Path(os.fsdecode(path)).is_file()
    except (OSError, ValueError):
        return False


def load_mask(mask: ImageInput, size: tuple[int, int] | None = None, orientation: int = 1) -> np.ndarray:
    """Load a mask as a bool array whose foreground is True.

    A pixel is foreground if its value is nonzero; in a mask whose largest value is 128 to 255, if it is at least 128
    (soft edges and JPEG noise are background); in a float mask, if it is at least 0.5. Palette masks are read by
    index, except for black-and-white palettes, which are read by color. Color masks are read by their brightest
    channel.

    Args:
        mask: See `ImageInput`.
        size: (width, height) that the mask must have, which is the size of its image after EXIF rotation.
        orientation: EXIF orientation of the image, if known; see `check_mask_frame`.

    Returns:
        A bool array of shape (H, W).

    Raises:
        FileNotFoundError: If a path does not exist or is not a file.
        ValueError: If the mask cannot be read or its size differs from the image.
    """
    mask_orientation = 1
    if _is_array(mask):
        foreground = _array_foreground(_check_array(mask, "mask"))
    else:
        mask_image, mask_orientation = open_oriented_mask(mask)
        foreground = image_foreground(mask_image)
    if size is not None:
        mask_size = foreground.shape[::-1]
        name = f" {describe_input(mask)}" if isinstance(mask, (str, os.PathLike)) else ""
        check_mask_frame(f"mask{name}", mask_size, mask_orientation, size, orientation)
        if mask_size != tuple(size):
            raise ValueError(describe_size_mismatch(f"mask{name}", mask_size, size))
    return foreground


def load_gray_mask(mask: ImageInput) -> Image.Image:
    """Load a mask as an "L" image with its soft edges: its gray values if it has any, else 255 in the foreground.

    Args:
        mask: See `ImageInput`.

    Raises:
        FileNotFoundError: If a path does not exist or is not a file.
        ValueError: If the mask cannot be read.
    """
    if _is_array(mask):
        array = _check_array(mask, "mask")
        gray = array if array.ndim == 2 else None
        foreground = _array_foreground(array)
    else:
        mask_image = open_oriented_mask(mask)[0]
        gray = np.asarray(mask_image) if mask_image.mode == "L" else None
        foreground = image_foreground(mask_image)
    if gray is not None and gray.dtype.kind == "f":
        return Image.fromarray(np.rint(gray * 255.0).astype(np.uint8))
    # A mask without values of 128 or more contains labels, not gray values (see `load_mask`).
    if gray is not None and gray.dtype == np.uint8 and gray.max(initial=0) >= _MASK_LEVEL:
        return Image.fromarray(np.ascontiguousarray(gray))
    return mask_to_image(foreground)


def open_mask(mask: ImageInput) -> Image.Image:
    """Open a mask as a PIL image after EXIF rotation; black-and-white palettes are converted to "L".

    Args:
        mask: See `ImageInput`; arrays are not accepted.

    Raises:
        FileNotFoundError: If a path does not exist or is not a file.
        ValueError: If the mask cannot be read.
    """
    return open_oriented_mask(mask)[0]


def open_oriented_mask(mask: ImageInput) -> tuple[Image.Image, int]:
    """Open a mask like `open_mask`, and also return the EXIF orientation that was applied."""
    mask_image, orientation = _rotate(*_open(mask, "mask"))
    if mask_image.mode == "P" and _has_white(mask_image):  # in a GIF, white may have index 0
        mask_image = mask_image.convert("L")
    return mask_image, orientation


def mask_to_image(mask: np.ndarray) -> Image.Image:
    """Convert a bool array (H, W) to an "L" image with values 0 and 255, which `load_mask` can read."""
    return Image.fromarray(mask.astype(bool).astype(np.uint8) * 255)


def probabilities_to_image(probabilities: np.ndarray) -> Image.Image:
    """Convert probabilities (H, W) to an 8-bit grayscale image, with 255 for probability 1."""
    return Image.fromarray(np.rint(np.clip(probabilities, 0, 1) * 255).astype(np.uint8))


def _open(image: ImageInput, role: str) -> tuple[Image.Image, int]:
    """Open and decode an input ("image" or "mask", named `role` in errors); also return its EXIF orientation."""
    if isinstance(image, Image.Image):
        return _decode(image, image, role)
    if isinstance(image, np.ndarray) and image.ndim == 0 and image.dtype.kind in "OUS":
        image = image.item()  # a zero-dimensional array that contains a path
    if _is_array(image):
        return _array_to_image(_check_array(image, role)), 1
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image), image, role)
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        if isinstance(path, str) and path.startswith(("http://", "https://")):
            return _decode(io.BytesIO(_download(path, role)), image, role)
        _check_is_file(image, role)
        return _decode(path, image, role)
    if hasattr(image, "read"):
        return _decode(image, image, role)
    raise ValueError(
        f"{role} is a {type(image).__name__}; give a PIL image, an array, a path, a URL or bytes."
    )


def _check_is_file(path: str | os.PathLike, role: str) -> None:
    if not is_file(path):
        raise FileNotFoundError(f"{role} {describe_input(path)} is not a file; give the path of an image.")


def _decode(source: Any, image: ImageInput, role: str) -> tuple[Image.Image, int]:
    decoded = source if isinstance(source, Image.Image) else _open_lazily(source, image, role)
    try:
        orientation = _read_orientation(decoded)  # before load(), which applies and removes that of a TIFF
        decoded.load()  # Pillow is lazy: a truncated file fails only here
    except Exception as error:  # decoders raise almost anything on damaged files
        if decoded is not source:
            decoded.close()
        raise _unreadable_error(image, role) from error
    if decoded.width == 0 or decoded.height == 0:
        raise ValueError(
            f"{role} {describe_input(image)} has no pixels ({decoded.width} x {decoded.height}); "
            "give an image with content."
        )
    return decoded, orientation


def _open_lazily(source: Any, image: ImageInput, role: str) -> Image.Image:
    """Open an image without decoding its pixels."""
    try:
        return Image.open(source)
    except Image.DecompressionBombError as error:
        raise ValueError(
            _sentence(f"{role} {describe_input(image)} is too large to be opened safely: {error}")
        ) from error
    except UnidentifiedImageError as error:
        head = read_head(source if hasattr(source, "read") else os.fspath(source))
        if is_heic(head) and register_heic_reader():
            return _open_heic(source, image, role)
        reason = explain_unreadable(head)
        if reason is None:
            raise _unreadable_error(image, role) from error
        raise ValueError(f"{role} {describe_input(image)} {reason}.") from error
    except Exception as error:  # decoders raise almost anything on damaged files
        raise _unreadable_error(image, role) from error


def _open_heic(source: Any, image: ImageInput, role: str) -> Image.Image:
    if hasattr(source, "read"):
        source.seek(0)
    try:
        return Image.open(source)
    except Exception as error:
        raise _unreadable_error(image, role) from error


def _unreadable_error(image: ImageInput, role: str) -> ValueError:
    return ValueError(f"{role} {describe_input(image)} cannot be read; it is damaged or not an image.")


def _download(url: str, role: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "conceptseg-hf"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, ValueError) as error:
        raise ValueError(_sentence(f"{role} {url!r} cannot be downloaded: {error}")) from error


def _rotate(image: Image.Image, orientation: int) -> tuple[Image.Image, int]:
    """Apply the EXIF orientation and return it with the image; unreadable EXIF data is ignored."""
    try:
        return ImageOps.exif_transpose(image), orientation
    except Exception:
        return image, 1


def _read_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # malformed EXIF data can raise almost anything
        return 1
    return orientation if orientation in range(2, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bit(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> np.ndarray:
    """Convert an image of mode "I", "I;16" or "F" to gray values of dtype uint8.

    "I;16" is 16-bit; "I" is 16-bit if a value exceeds 255; "F" ranges from 0 to 1, or to 255 if a value exceeds 1.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = values.max(initial=0.0)
    if image.mode.startswith("I;16") or (image.mode == "I" and top > 255.0):
        values = values / 257.0
    elif image.mode == "F" and top <= 1.0:
        values = values * 255.0
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _is_array(value: Any) -> bool:
    # NumPy strings and bytes have `__array__`, but are paths or encoded images.
    not_arrays = (Image.Image, str, bytes, os.PathLike)
    return not isinstance(value, not_arrays) and hasattr(value, "__array__")


def _check_array(value: Any, role: str) -> np.ndarray:
    """Convert to an array of shape (H, W), (H, W, 3) or (H, W, 4) and check dtype and value range."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # for example a tensor on an accelerator
        raise ValueError(_sentence(f"{role} cannot be read as an array: {error}")) from error
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(
            f"{role} array has shape {tuple(array.shape)}; "
            "give (H, W), (H, W, 3) or (H, W, 4), channels last."
        )
    if array.size == 0:
        raise ValueError(
            f"{role} array has shape {tuple(array.shape)} and so no pixels; give an array with content."
        )
    kind = array.dtype.kind
    if kind not in "buif":
        raise ValueError(f"{role} array has dtype {array.dtype}; give bool, uint8, uint16 or float.")
    if kind == "f" and not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
        raise ValueError(f"{role} array is float but not within 0 to 1; scale it, or give uint8.")
    if kind in "ui" and array.dtype not in (np.uint8, np.uint16) and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"{role} array is {array.dtype} but not within 0 to 255; give uint8 or uint16.")
    return array


def _array_to_image(array: np.ndarray) -> Image.Image:
    if array.dtype.kind == "f":
        array = np.rint(array * 255.0)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257.0)
    elif array.dtype.kind == "b":
        array = array * 255
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def image_foreground(image: Image.Image) -> np.ndarray:
    """Return the foreground (H, W), bool, of an image opened by `open_mask`; see `load_mask` for its definition."""
    mode = image.mode
    if mode == "LA":
        return _array_foreground(np.asarray(image.getchannel("L"))) & (
            np.asarray(image.getchannel("A")) >= _MASK_LEVEL
        )
    if mode in ("1", "L", "P", "F", "RGB", "RGBA") or mode.startswith("I"):
        return _array_foreground(np.asarray(image))
    return _array_foreground(np.asarray(image.convert("RGBA" if mode in ("PA", "La", "RGBa") else "RGB")))


def _has_white(image: Image.Image) -> bool:
    """Whether a palette image uses only gray colors, at least one of them bright, and so is not a class map."""
    palette = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    used = palette[[index for index in np.unique(np.asarray(image)) if index < len(palette)]]
    return bool((used == used[:, :1]).all() and used.max(initial=0) >= _MASK_LEVEL)


def _array_foreground(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        foreground = _array_foreground(array[..., :3].max(axis=-1))
        # Transparent pixels are background, whatever their color.
        return foreground & _array_foreground(array[..., 3]) if array.shape[-1] == 4 else foreground
    if array.dtype.kind == "b":
        return array.copy()
    if array.dtype.kind == "f":
        return array >= 0.5
    if _MASK_LEVEL <= array.max(initial=0) <= 255:
        return array >= _MASK_LEVEL
    return array != 0


def describe_input(image: ImageInput) -> str:
    """Return the name of an input for error messages: its path, or its type."""
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image)
        return repr(str(path) if isinstance(path, str) else path)
    if isinstance(image, Image.Image):
        return f"(a PIL image of mode {image.mode})"
    return f"(given as {type(image).__name__})"


def _sentence(text: str) -> str:
    """Return a message as one line that ends with a period."""
    return " ".join(text.split()).rstrip(".") + "."
