"""How a data set writes down what is true: a mask file, a value in a map of labels, polygons, or a box alone."""

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
    """The truth of one sample, read only when it is needed."""

    box_only = False
    """Whether the mask is only a filled box."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it reads."""
        path = getattr(self, "path", None)
        return () if path is None else (path,)

    @property
    def name(self) -> str:
        """What it is called in a message."""
        return "mask" + "".join(f" {str(path)!r}" for path in self.files[:1])

    @abstractmethod
    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """The mask, and where pixels do not count (None: all count), both (H, W) bool.

        Masks of files have the size that they are stored in, which may be another than the image's.

        Args:
            size: (width, height) of the image; None when the image cannot be read.
            orientation: EXIF orientation of the image.

        Raises:
            OSError, ValueError: If it cannot be read, is of the image before its EXIF rotation, or needs the size and
                there is none.
        """

    def read_soft(self) -> Image.Image | None:
        """The mask with its soft edges, "L", at the size that it is stored in; None where it has none.

        Raises:
            OSError, ValueError: If it cannot be read.
        """
        return None


@dataclass(frozen=True)
class MaskFile(GroundTruth):
    """A mask of its own file; see `images.load_mask` for what counts as foreground."""

    path: Path

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Truth.read`."""
        picture, own_orientation = open_oriented_mask(self.path)
        if looks_like_photo(picture):
            raise ValueError(
                f"{self.name} is a photo, not a mask; give an image in which the concept is white and all other pixels "
                "are black."
            )
        if size is not None:
            check_mask_frame(self.name, picture.size, own_orientation, size, orientation)
        return image_foreground(picture), None

    def read_soft(self) -> Image.Image | None:
        """See `Truth.read_soft`."""
        grey = load_gray_mask(self.path)
        histogram = grey.histogram()
        return grey if sum(histogram[1:255]) else None


@dataclass(frozen=True)
class LabelFile(GroundTruth):
    """One value of a map of labels (one channel, whole numbers).

    Attributes:
        path: The map.
        label: The value of the concept.
        ignored: Values of pixels that do not count.
    """

    path: Path
    label: int
    ignored: frozenset[int] = frozenset()

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Truth.read`."""
        labels = read_labels(self.path)
        if size is not None:
            check_mask_frame(self.name, labels.shape[::-1], 1, size, orientation)
        return labels == self.label, np.isin(labels, tuple(self.ignored)) if self.ignored else None


@dataclass(frozen=True)
class PolygonFile(GroundTruth):
    """ReasonSeg's JSON: `shapes` of `label` and `points` in pixels.

    Shapes labelled "flag" are skipped; larger ones are painted first; those whose label contains "ignore" do not count.
    Coordinates are cut to whole pixels and outlines belong to the shape, as in LISA's reader; borders may differ from
    it by single pixels, as the libraries that paint differ.
    """

    path: Path

    def read_annotation(self) -> dict[str, Any]:
        """The whole annotation: an object with `shapes`, `text` and `is_sentence`."""
        annotation = read_json(self.path, fallback_encoding="cp1252")
        if not isinstance(annotation, dict) or not isinstance(annotation.get("shapes"), list):
            raise ValueError(
                f"{str(self.path)!r} has no list of shapes; give ReasonSeg's JSON as it is published."
            )
        return annotation

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Truth.read`."""
        if size is None:
            raise ValueError(f"the polygons of {str(self.path)!r} need the size of their image.")
        painted = []
        for shape in self.read_annotation()["shapes"]:
            try:
                label = shape["label"].lower()
                points = [(int(x), int(y)) for x, y in shape["points"]]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"a shape of {str(self.path)!r} is not a label with points; give ReasonSeg's JSON as it is "
                    "published."
                ) from error
            if label != "flag" and points:
                painted.append((_polygon(points, size), "ignore" in label))
        mask, ignore = np.zeros((2, size[1], size[0]), dtype=bool)
        for pixels, is_ignored in sorted(painted, key=lambda shape: -np.count_nonzero(shape[0])):
            mask[pixels], ignore[pixels] = not is_ignored, is_ignored
        return mask, ignore  # also where nothing is ignored: protocols go by what a data set knows


@dataclass(frozen=True)
class BoxGroundTruth(GroundTruth):
    """A box and no mask: x1, y1, x2, y2 as fractions of the image's sides."""

    fractions: tuple[float, ...]
    box_only = True

    def box(self, size: Size) -> Box:
        """The box in pixels, cut to the image."""
        x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in self.fractions)
        return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Truth.read`."""
        if size is None:
            raise ValueError("a box in fractions needs the size of its image.")
        return _filled(self.box(size), size), None


@dataclass(frozen=True)
class PixelBox(GroundTruth):
    """A box and no mask: x1, y1, x2, y2 in pixels, x2 and y2 exclusive."""

    pixels: Box
    box_only = True

    def box(self, size: Size) -> Box:
        """The box in pixels."""
        return self.pixels

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Truth.read`."""
        if size is None:
            raise ValueError("a box needs the size of its image.")
        return _filled(self.pixels, size), None


def read_labels(path: Path) -> np.ndarray:
    """A map of labels, (H, W), whole numbers; palette images by index."""
    try:
        with Image.open(path) as picture:
            labels = np.array(picture)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged files
        raise ValueError(f"labels {str(path)!r} cannot be read; the file is damaged or no image.") from error
    if labels.ndim != 2:
        raise ValueError(
            f"labels {str(path)!r} have {labels.shape[-1]} channels; give the map of labels, one channel."
        )
    return labels


def resize(mask: np.ndarray, size: Size) -> np.ndarray:
    """A mask (H, W) bool at another size (width, height), by the nearest pixel; itself if it has that size."""
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
    """Every pixel that a box touches."""
    mask = np.zeros((size[1], size[0]), dtype=bool)
    x1, y1, x2, y2 = box
    mask[max(int(y1), 0) : math.ceil(y2), max(int(x1), 0) : math.ceil(x2)] = True
    return mask
