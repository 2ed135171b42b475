"""Objects that are cut out of photographs by their ground-truth masks, and photographs as backgrounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ...boxes import mask_to_box
from ...images import load_image, load_mask
from ..files import FileItem
from ..ground_truths import MaskFile

Rng = np.random.Generator

OBJECT_SETS = ("coco128", "ecssd", "camo", "msrc-cow", "davis2016-val")
"""Datasets of `photos` whose masks cover whole objects."""

BACKGROUND_SETS = ("camvid", "cwfid", "sbi2015", "ecssd", "camo", "coco128")
"""Datasets of `photos` whose images serve as backgrounds."""

SCENERY_SETS = ("camvid", "cwfid", "sbi2015")
"""Those without a single dominant object."""

ANY_OBJECT = "object"
"""Noun of objects whose dataset does not name their class."""

_MIN_SIDE, _MIN_FRACTION, _MAX_FRACTION = 40, 0.01, 0.6
_MAX_TRIES = 200


@dataclass(frozen=True)
class Cutout:
    """An object without its background.

    Attributes:
        pixels: RGBA image, cropped to the object; the alpha channel has soft edges.
        noun: Class of the object, or `ANY_OBJECT`.
        source: Path of the photograph.
    """

    pixels: Image.Image
    noun: str
    source: Path


class CutoutLibrary:
    """The objects and backgrounds of one split; images are read when they are drawn.

    Args:
        items: Samples of the split in the benchmark `photos`.

    Raises:
        ValueError: If there are no objects or no backgrounds.
    """

    def __init__(self, items: Sequence[FileItem]) -> None:
        self._objects = [
            item
            for item in items
            if item.dataset in OBJECT_SETS and not item.references and isinstance(item.ground_truth, MaskFile)
        ]
        # Datasets with a single image per scene and listed references: the targets contain the object as well.
        self._objects += [item for item in items if item.dataset == "davis2016-val"]
        self._backgrounds = _images_of(items, BACKGROUND_SETS)
        self._scenery = _images_of(items, SCENERY_SETS) or self._backgrounds
        if not self._objects or not self._backgrounds:
            raise ValueError(
                "ConceptPhotos: the folder has no datasets of objects and backgrounds; it needs at least one of "
                f"{', '.join(OBJECT_SETS)} and one of {', '.join(BACKGROUND_SETS)}."
            )
        self._by_noun: dict[str, list[FileItem]] = {}
        for item in self._objects:
            self._by_noun.setdefault(noun_of(item), []).append(item)

    @cached_property
    def named_classes(self) -> dict[str, int]:
        """Named classes with usable objects in at least two photographs, and the number of these photographs."""
        usable = {
            noun: len({item.image for item in items if cut_out(item) is not None})
            for noun, items in self._by_noun.items()
            if noun != ANY_OBJECT
        }
        return {noun: count for noun, count in usable.items() if count > 1}

    def draw(self, rng: Rng, noun: str | None = None, avoid: Sequence[Cutout] = ()) -> Cutout:
        """Draw an object.

        Args:
            rng: Random generator.
            noun: Class of the object; any class by default.
            avoid: Objects whose photographs, and named classes if `noun` is None, are not drawn.

        Raises:
            ValueError: If no object can be used.
        """
        items = self._objects if noun is None else self._by_noun.get(noun, [])
        sources = {cutout.source for cutout in avoid}
        classes = {cutout.noun for cutout in avoid if noun is None and cutout.noun != ANY_OBJECT}
        for item in _shuffled(rng, items):
            if item.image in sources or noun_of(item) in classes:
                continue
            if (cutout := cut_out(item)) is not None:
                return cutout
        raise ValueError(f"ConceptPhotos: no usable object of class {noun or ANY_OBJECT!r} is left.")

    def background(
        self, rng: Rng, size: int, avoid: Sequence[Cutout] = (), scenery: bool = False
    ) -> Image.Image:
        """Draw a square background of the given size that contains none of the objects.

        Args:
            rng: Random generator.
            size: Side length in pixels.
            avoid: Objects whose photographs are not used.
            scenery: Only photographs without a single dominant object.
        """
        paths = self._scenery if scenery else self._backgrounds
        sources = {cutout.source for cutout in avoid}
        while True:
            path = paths[int(rng.integers(len(paths)))]
            if path not in sources:
                return square_crop(rng, _read(path), size)


def _images_of(items: Sequence[FileItem], datasets: Sequence[str]) -> list[Path]:
    return sorted({item.image for item in items if item.dataset in datasets})


def noun_of(item: FileItem) -> str:
    """Return the class of an object: the prompt of CI samples; other prompts do not name a class."""
    return item.prompt if item.level == "CI" else ANY_OBJECT


def square_crop(rng: Rng, image: Image.Image, size: int) -> Image.Image:
    """Crop a random square with the full height or width of an image, and resize it."""
    side = min(image.size)
    left, top = (int(rng.integers(length - side + 1)) for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


@lru_cache(maxsize=4096)
def cut_out(item: FileItem) -> Cutout | None:
    """Cut out the object of a sample; None if it is too small, too large, or cropped by the border of the image."""
    image = _read(item.image)
    assert isinstance(item.ground_truth, MaskFile)
    mask = load_mask(item.ground_truth.path, image.size)
    box = mask_to_box(mask)
    if box is None or not _MIN_FRACTION <= mask.mean() <= _MAX_FRACTION or not is_connected(mask):
        return None
    x1, y1, x2, y2 = box
    on_border = [x1 <= 1, y1 <= 1, x2 >= image.width - 1, y2 >= image.height - 1]
    if min(x2 - x1, y2 - y1) < _MIN_SIDE or any(on_border):
        return None
    alpha = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(3))
    alpha = alpha.filter(ImageFilter.GaussianBlur(0.8))
    pixels = image.copy()
    pixels.putalpha(alpha)
    return Cutout(pixels.crop(box), noun_of(item), item.image)


def is_connected(mask: np.ndarray, fraction: float = 0.85, side: int = 64) -> bool:
    """Whether one connected part contains a fraction of a mask, at a resolution of `side` cells."""
    image = Image.fromarray((np.asarray(mask) * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BOX
    )
    cells = np.pad(np.asarray(image) > 64, 1)
    remaining, total = cells.copy(), int(cells.sum())
    while remaining.sum() >= fraction * total > 0:
        part = np.zeros_like(cells)
        part.flat[int(np.argmax(remaining))] = True
        count = 0
        while (size := int(part.sum())) != count:
            count = size
            grown = part.copy()
            for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
                grown |= np.roll(part, step, axis)
            part = grown & cells
        if count >= fraction * total:
            return True
        remaining &= ~part
    return False


@lru_cache(maxsize=256)
def _read(path: Path) -> Image.Image:
    return load_image(path)


def _shuffled(rng: Rng, items: Sequence[FileItem]) -> Iterator[FileItem]:
    """Iterate over random items without listing a permutation of all of them."""
    if not items:
        return
    for _ in range(_MAX_TRIES):
        yield items[int(rng.integers(len(items)))]
