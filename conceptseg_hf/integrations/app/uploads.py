"""Reading of uploaded images with limits on their size and format."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from ...image_formats import HEAD_LENGTH, explain_unreadable
from ...images import load_image

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 40_000_000
# Pillow runs other programs to read some formats, such as EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class UploadError(ValueError):
    """An uploaded file is refused; the message is one sentence."""


def read_upload(source: str | os.PathLike | bytes, name: str | None = None, rgb: bool = True) -> Image.Image:
    """Read an uploaded image after checking its size in bytes, its format and its number of pixels.

    Args:
        source: A local file, or the content of one. URLs are not read.
        name: Name of the file in messages.
        rgb: Whether to apply the EXIF rotation and convert to RGB; otherwise the image is returned as it is.

    Raises:
        UploadError: If the file is refused or damaged.
    """
    if name is None:
        name = "the image" if isinstance(source, bytes) else repr(Path(source).name[:80])
    content = source if isinstance(source, bytes) else _read(source, name)
    if len(content) > MAX_BYTES:
        raise UploadError(
            f"{name} has {len(content) / 2**20:.0f} MB; upload an image of at most {MAX_BYTES >> 20} MB."
        )
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        reason = explain_unreadable(content[:HEAD_LENGTH])
        if reason is None:
            reason = f"is damaged or not an image; upload a file of type {', '.join(FORMATS)}"
        raise UploadError(f"{name} {reason}.") from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, image.size)
    try:
        if rgb:
            return load_image(content)
        image.load()
    except Exception as error:
        raise UploadError(f"{name} is damaged; save it again and upload the new file.") from error
    return image


def _too_large(name: str, size: tuple[int, int] | None = None) -> UploadError:
    pixels = "too many" if size is None else f"{size[0]} x {size[1]}"
    return UploadError(
        f"{name} has {pixels} pixels; upload an image of at most {MAX_PIXELS // 1_000_000} million pixels."
    )


def _read(path: str | os.PathLike, name: str) -> bytes:
    """Read at most one byte more than allowed, which is enough to refuse the file."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UploadError(f"{name} cannot be read; upload it again.") from error
