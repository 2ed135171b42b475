"""The photographs of the benchmark `photos` as training images: every image once, with all its marked regions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from conceptseg_hf.data.files import FileItem
from conceptseg_hf.data.ground_truths import MaskFile
from conceptseg_hf.images import load_image, load_mask

from .leaks import training_items
from .nouns import COCO_CLASSES, domain_of, exclude_each_other, nouns_of
from .scenes import Region, Scene

Part = Literal["train", "vlm", "ctm", "val"]
"""Part of the training photographs: "train" consists of "vlm" and "ctm".

The VLM is not trained on "ctm", so that the CTM learns from completions that are as accurate as those of new images:
a VLM locates the objects of its own training images better.
"""
_VAL_PERCENT, _CTM_PERCENT = 5, 10
# Only images without a fixed orientation are rotated.
_ROTATED_DATASETS = frozenset(
    "bsdata camo crackforest cwfid isic2018-128 kvasir-seg magnetic-tile neu-seg".split()
)
_COMPLETE_DATASETS = frozenset(
    {"coco128", "magnetic-tile"}
)  # all nouns of the dataset are marked in each image
_MIN_FRACTION = 0.0004  # smallest fraction of the image for a region of a training image


@dataclass(frozen=True)
class Photograph:
    """An image file with the mask files of its regions.

    Attributes:
        path: The image.
        dataset: Its dataset.
        masks: Nouns and mask file of each region.
        absent: Nouns of which it is known to contain nothing.
    """

    path: Path
    dataset: str
    masks: tuple[tuple[tuple[str, ...], Path], ...]
    absent: tuple[str, ...]

    @cached_property
    def nouns(self) -> frozenset[str]:
        """The nouns of the regions."""
        return frozenset(noun for nouns, _ in self.masks for noun in nouns)

    @cached_property
    def known(self) -> frozenset[str]:
        """The nouns that are known to be present or absent."""
        return self.nouns.union(self.absent)


class PhotographLibrary:
    """The training photographs of the benchmark `photos`, divided into parts by a hash of their names.

    Args:
        root: Folder of the benchmark.
        part: The part: 85 % of the photographs are "vlm", 10 % "ctm" and 5 % "val".
        size: Side length S of all images in pixels.

    Raises:
        ValueError: If there are no photographs in the part.
    """

    def __init__(self, root: Path, part: Part, size: int) -> None:
        self.size = size
        items = training_items(root)
        nouns = {item.dataset: set[str]() for item in items}
        for item in items:
            nouns[item.dataset].update(nouns_of(item))
        if "coco128" in nouns:
            nouns["coco128"].update(COCO_CLASSES)
        self.nouns = tuple(sorted(set().union(*nouns.values())))
        by_image: dict[Path, list[FileItem]] = {}
        for item in items:
            if isinstance(item.ground_truth, MaskFile) and _is_in(item.image, part):
                by_image.setdefault(item.image, []).append(item)
        if not by_image:
            raise ValueError(f"{str(root)!r} has no photographs in the part {part!r}; use more photographs.")
        self.items = [item for group in by_image.values() for item in group]
        self.datasets: dict[str, list[Photograph]] = {}
        self._photographs: dict[Path, Photograph] = {}
        for path, group in by_image.items():
            photograph = self._photographs[path] = _photograph(path, group, nouns)
            self.datasets.setdefault(photograph.dataset, []).append(photograph)

    def photograph(self, item: FileItem) -> Photograph:
        """Return the photograph of a sample; samples without a class have only their own region."""
        photograph = self._photographs[item.image]
        return photograph if nouns_of(item) else replace(photograph, masks=_masks_of([item]))

    def draw(self, rng: np.random.Generator) -> Scene:
        """Draw a scene with random crop, mirroring, rotation and colors.

        Datasets are drawn with the square root of their number of regions.
        """
        photographs = self._random_dataset(rng)
        for _ in range(8):
            scene = self.augmented(rng, photographs[int(rng.integers(len(photographs)))])
            if scene.regions:
                break
        return scene

    def draw_several(self, rng: np.random.Generator, count: int) -> list[Scene]:
        """Draw scenes as `draw`, if possible such that each noun of one is known to be present or absent in all."""
        chosen: list[Photograph] = []
        while len(chosen) < count:
            for _ in range(6):
                photographs = self._random_dataset(rng)
                photograph = photographs[int(rng.integers(len(photographs)))]
                if all(
                    photograph.nouns <= other.known and other.nouns <= photograph.known for other in chosen
                ):
                    break
            chosen.append(photograph)
        return [self.augmented(rng, photograph) for photograph in chosen]

    def _random_dataset(self, rng: np.random.Generator) -> list[Photograph]:
        names, probabilities = self._dataset_probabilities
        return self.datasets[names[int(rng.choice(len(names), p=probabilities))]]

    @cached_property
    def _dataset_probabilities(self) -> tuple[list[str], np.ndarray]:
        names = sorted(self.datasets)
        regions = [sum(len(photograph.masks) for photograph in self.datasets[name]) for name in names]
        return names, np.sqrt(regions) / np.sqrt(regions).sum()

    def scene(self, photograph: Photograph) -> Scene:
        """Return a photograph without augmentation, squeezed to a square as by the processor."""
        image = load_image(photograph.path)
        masks = [(nouns, load_mask(path, image.size)) for nouns, path in photograph.masks]
        return self._to_scene(image, masks, photograph.absent)

    def augmented(self, rng: np.random.Generator, photograph: Photograph) -> Scene:
        """Return a photograph with random crop, mirroring, rotation and colors."""
        image = load_image(photograph.path)
        masks = [(nouns, load_mask(path, image.size)) for nouns, path in photograph.masks]
        scale, aspect = rng.uniform(0.55, 1.0), np.exp(rng.uniform(-0.2, 0.2))
        width, height = (
            max(8, round(length * min(1.0, scale * factor)))
            for length, factor in zip(image.size, (aspect, 1 / aspect), strict=True)
        )
        if rng.random() < 0.3:
            width, height = image.size
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        rows, columns = slice(top, top + height), slice(left, left + width)
        image = image.crop((left, top, left + width, top + height))
        scene = self._to_scene(
            image, [(nouns, mask[rows, columns]) for nouns, mask in masks], photograph.absent
        )
        turns = int(rng.integers(4)) if photograph.dataset in _ROTATED_DATASETS else 0
        mirrored = rng.random() < 0.5

        def transform(array: np.ndarray) -> np.ndarray:
            array = np.rot90(array, turns)
            return np.ascontiguousarray(array[:, ::-1] if mirrored else array)

        regions = tuple(Region(region.nouns, transform(region.mask)) for region in scene.regions)
        return Scene(_with_other_colors(rng, transform(scene.pixels)), regions, scene.absent)

    def _to_scene(
        self,
        image: Image.Image,
        masks: Sequence[tuple[tuple[str, ...], np.ndarray]],
        absent: tuple[str, ...],
    ) -> Scene:
        size = (self.size, self.size)
        regions = []
        for nouns, mask in masks:
            resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
            array = np.asarray(resized) > 127
            if array.mean() >= _MIN_FRACTION:
                regions.append(Region(nouns, array))
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        # A noun without a region may still have some pixels that were dropped; it is neither present nor absent.
        return Scene(pixels, tuple(regions), absent)


def _photograph(path: Path, items: Sequence[FileItem], nouns: dict[str, set[str]]) -> Photograph:
    """Return the photograph of some samples.

    Args:
        path: The image.
        items: Its samples.
        nouns: The nouns of each dataset.
    """
    dataset = items[0].dataset
    masks = _masks_of(items)
    domain = domain_of(dataset)
    absent = set[str]().union(
        *(names for other, names in nouns.items() if exclude_each_other(domain, domain_of(other)))
    )
    absent -= nouns[dataset]
    if dataset in _COMPLETE_DATASETS:
        absent |= nouns[dataset]
    absent -= {noun for names, _ in masks for noun in names}
    return Photograph(path, dataset, masks, tuple(sorted(absent)))


def _masks_of(items: Sequence[FileItem]) -> tuple[tuple[tuple[str, ...], Path], ...]:
    """Return the nouns and the mask file of each region of some samples of one image."""
    masks: dict[Path, tuple[str, ...]] = {}
    for item in items:
        assert isinstance(item.ground_truth, MaskFile)
        masks.setdefault(item.ground_truth.path, nouns_of(item))
    return tuple((nouns, path) for path, nouns in masks.items())


def _is_in(path: Path, part: Part) -> bool:
    digest = hashlib.sha256(f"{path.parent.parent.name}/{path.name}".encode()).digest()
    percent = digest[0] * 100 / 256
    if percent < _VAL_PERCENT:
        return part == "val"
    return part in ("train", "ctm" if percent < _VAL_PERCENT + _CTM_PERCENT else "vlm")


def _with_other_colors(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Change brightness, contrast and the balance of the channels at random."""
    if rng.random() < 0.3:
        return pixels
    x = pixels.astype(np.float32)
    mean = x.mean()
    gains = rng.uniform(0.75, 1.3) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    x = (x - mean) * gains + mean * rng.uniform(0.75, 1.25)
    if rng.random() < 0.1:
        x = np.repeat(x.mean(axis=2, keepdims=True), 3, axis=2)
    return x.clip(0, 255).astype(np.uint8)
