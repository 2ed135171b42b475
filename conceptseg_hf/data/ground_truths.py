"""Ground-truth formats of datasets: mask files, values in label maps, polygons, and boxes without a mask."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..boxes import Box
from ..images import image_foreground, load_gray_mask, open_oriented_mask
from ..mask_checks import check_mask_frame, looks_like_photo
from .paths import read_json

Size = tuple[int, int]


class GroundTruth(ABC):
    """Ground truth of one sample, read on demand."""

    box_only = False
    """Whether the ground truth is a box without a mask; the mask is then the filled box."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        path = getattr(self, "path", None)
        return () if path is None else (path,)

    @property
    def name(self) -> str:
        """Name of the ground truth in messages."""
        return "mask" + "".join(f" {str(path)!r}" for path in self.files[:1])

    @abstractmethod
    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """Read the mask, and the mask of ignored pixels (None if none are ignored), both (H, W) bool.

        Masks from files have their stored size, which may differ from that of the image.

        Args:
            size: (width, height) of the image; None if the image cannot be read.
            orientation: EXIF orientation of the image.

        Raises:
            OSError, ValueError: If it cannot be read, if it belongs to the image before EXIF rotation, or if it needs
                the size and that is None.
        """

    def read_soft(self) -> Image.Image | None:
        """Read the mask with its soft edges, "L", at its stored size; return None if it has none.

        Raises:
            OSError, ValueError: If it cannot be read.
        """
        return None


@dataclass(frozen=True)
class MaskFile(GroundTruth):
    """A mask in an image file; see `images.load_mask` for the definition of foreground."""

    path: Path

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `GroundTruth.read`."""
        mask_image, mask_orientation = open_oriented_mask(self.path)
        if looks_like_photo(mask_image):
            raise ValueError(
                f"{self.name} is a photo, not a mask; give an image in which the concept is white and all other pixels "
                "are black."
            )
        if size is not None:
            check_mask_frame(self.name, mask_image.size, mask_orientation, size, orientation)
        return image_foreground(mask_image), None

    def read_soft(self) -> Image.Image | None:
        """See `GroundTruth.read_soft`."""
        mask_image = load_gray_mask(self.path)
        histogram = mask_image.histogram()
        return mask_image if sum(histogram[1:255]) else None


@dataclass(frozen=True)
class LabelFile(GroundTruth):
    """One value in a label map (one channel, integers).

    Attributes:
        path: Path of the label map.
        label: Value of the concept.
        ignored: Values of ignored pixels.
    """

    path: Path
    label: int
    ignored: frozenset[int] = frozenset()

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `GroundTruth.read`."""
        labels = read_labels(self.path)
        if size is not None:
            check_mask_frame(self.name, labels.shape[::-1], 1, size, orientation)
        return labels == self.label, np.isin(labels, tuple(self.ignored)) if self.ignored else None


@dataclass(frozen=True)
class PolygonFile(GroundTruth):
    """ReasonSeg's JSON: `shapes` with `label` and `points` in pixels.

    Shapes labeled "flag" are skipped. Larger shapes are drawn first. Shapes with "ignore" in their label are ignored
    regions. Coordinates are truncated to integers and outlines belong to the shape, as in LISA's reader; borders may
    differ by single pixels because the drawing libraries differ.
    """

    path: Path

    def read_annotation(self) -> dict[str, Any]:
        """Read the annotation, an object with `shapes`, `text` and `is_sentence`."""
        annotation = read_json(self.path, fallback_encoding="cp1252")
        if not isinstance(annotation, dict) or not isinstance(annotation.get("shapes"), list):
            raise ValueError(f"{str(self.path)!r} has no list of shapes; use ReasonSeg's JSON as published.")
        return annotation

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `GroundTruth.read`."""
        if size is None:
            raise ValueError(f"polygons of {str(self.path)!r} need the size of their image; pass size.")
        shapes = []
        for shape in self.read_annotation()["shapes"]:
            try:
                label = shape["label"].lower()
                points = [(int(x), int(y)) for x, y in shape["points"]]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"a shape of {str(self.path)!r} has no valid label and points; use ReasonSeg's JSON as published."
                ) from error
            if label != "flag" and points:
                shapes.append((_polygon(points, size), "ignore" in label))
        mask, ignore = np.zeros((2, size[1], size[0]), dtype=bool)
        for pixels, is_ignored in sorted(shapes, key=lambda shape: -np.count_nonzero(shape[0])):
            mask[pixels], ignore[pixels] = not is_ignored, is_ignored
        return mask, ignore  # never None: protocols depend on whether a dataset has ignored regions


@dataclass(frozen=True)
class BoxGroundTruth(GroundTruth):
    """A box without a mask: x1, y1, x2, y2 as fractions of the image's width and height."""

    fractions: tuple[float, ...]
    box_only = True

    def box(self, size: Size) -> Box:
        """Return the box in pixels, clipped to the image."""
        x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in self.fractions)
        return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `GroundTruth.read`."""
        if size is None:
            raise ValueError("a relative box needs the size of its image; pass size.")
        return _filled(self.box(size), size), None


@dataclass(frozen=True)
class PixelBox(GroundTruth):
    """A box without a mask: x1, y1, x2, y2 in pixels, x2 and y2 exclusive."""

    pixels: Box
    box_only = True

    def box(self, size: Size) -> Box:
        """Return the box in pixels."""
        return self.pixels

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `GroundTruth.read`."""
        if size is None:
            raise ValueError("a box needs the size of its image; pass size.")
        return _filled(self.pixels, size), None


def read_labels(path: Path) -> np.ndarray:
    """Read a label map, (H, W), integers; palette images give their indices."""
    try:
        with Image.open(path) as image:
            labels = np.array(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged files
        raise ValueError(
            f"label map {str(path)!r} cannot be read; the file is damaged or not an image."
        ) from error
    if labels.ndim != 2:
        raise ValueError(
            f"label map {str(path)!r} has {labels.shape[-1]} channels; use a label map with one channel."
        )
    return labels


def resize(mask: np.ndarray, size: Size) -> np.ndarray:
    """Resize a mask (H, W) bool to (width, height) with nearest-neighbor interpolation, if its size differs."""
    if mask.shape == (size[1], size[0]):
        return mask
    return np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _polygon(points: list[tuple[int, int]], size: Size) -> np.ndarray:
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    if len(points) < 3:
        draw.line(points * 2 if len(points) == 1 else points, fill=1)
    else:
        draw.polygon(points, fill=1, outline=1)
    return np.array(canvas)


def _filled(box: Box, size: Size) -> np.ndarray:
    """Return a mask of all pixels that a box touches."""
    mask = np.zeros((size[1], size[0]), dtype=bool)
    x1, y1, x2, y2 = box
    mask[max(int(y1), 0) : math.ceil(y2), max(int(x1), 0) : math.ceil(x2)] = True
    return mask
