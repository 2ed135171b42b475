"""One image of a batch job."""

from __future__ import annotations

from dataclasses import dataclass

from ..images import ImageInput

SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Extensions of the files that are images in a folder."""


@dataclass(frozen=True)
class ImageItem:
    """One image of a source.

    Attributes:
        index: Position in the source.
        name: Name in the results.
        image: Path, URL or encoded bytes; None if it cannot be read.
        error: None, or one sentence that states why there is no image.
    """

    index: int
    name: str
    image: ImageInput = None
    error: str | None = None
