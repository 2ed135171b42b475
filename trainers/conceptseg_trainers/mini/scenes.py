"""Scenes: images with marked regions, as photographs, composed of photographs, or drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_photos.compositing import PhotoScene
from conceptseg_hf.data.concept_photos.cutouts import CutoutLibrary
from conceptseg_hf.data.concept_photos.families import Studio
from conceptseg_hf.data.concept_shapes.scenes import Scene as DrawnScene

from .leaks import training_items
from .nouns import OBJECT


@dataclass(frozen=True)
class Region:
    """A marked region of an image.

    Attributes:
        nouns: Nouns that describe it, the answer first; empty if its class is not known.
        mask: (S, S) bool.
    """

    nouns: tuple[str, ...]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """An image with its regions.

    Attributes:
        pixels: (S, S, 3) uint8.
        regions: The regions; none is empty.
        absent: Nouns of which the image is known to contain nothing.
        drawn: The scene of ConceptShapes, if the image is drawn.
    """

    pixels: np.ndarray
    regions: tuple[Region, ...]
    absent: tuple[str, ...]
    drawn: DrawnScene | None = None

    def masks(self) -> dict[str, np.ndarray]:
        """Return the mask of each noun, the union of its regions."""
        masks: dict[str, np.ndarray] = {}
        for region in self.regions:
            for noun in region.nouns:
                masks[noun] = masks[noun] | region.mask if noun in masks else region.mask
        return masks


def sheet(scenes: Sequence[Scene], size: int) -> Scene:
    """Arrange scenes in a square grid: more objects in one image, at places that cannot be guessed.

    A noun is kept where it is known of all scenes whether they show it.

    Args:
        scenes: A square number of scenes; all absent nouns are listed.
        size: Side length of the image in pixels.
    """
    side = math.isqrt(len(scenes))
    edges = [round(size * i / side) for i in range(side + 1)]
    present = [set(scene.masks()) for scene in scenes]
    known = [nouns | set(scene.absent) for nouns, scene in zip(present, scenes, strict=True)]
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    regions = []
    for index, scene in enumerate(scenes):
        row, column = divmod(index, side)
        rows, columns = slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1])
        shape = edges[column + 1] - edges[column], edges[row + 1] - edges[row]
        pixels[rows, columns] = np.asarray(Image.fromarray(scene.pixels).resize(shape, Image.Resampling.BOX))
        for region in scene.regions:
            small = Image.fromarray(region.mask.astype(np.uint8) * 255).resize(shape, Image.Resampling.BOX)
            mask = np.zeros((size, size), dtype=bool)
            mask[rows, columns] = np.asarray(small) > 127
            if mask.any():
                nouns = tuple(noun for noun in region.nouns if all(noun in others for others in known))
                regions.append(Region(nouns, mask))
    absent = set.intersection(*(set(scene.absent) for scene in scenes))
    return Scene(pixels, tuple(regions), tuple(sorted(absent)))


class Composer:
    """Scenes of objects that are cut out of training photographs and pasted into others; see `ConceptPhotos`.

    Args:
        root: Folder of the benchmark `photos`.
        size: Side length of all images in pixels.
        absent: Nouns that no scene contains.
    """

    def __init__(self, root: Path, size: int, absent: tuple[str, ...]) -> None:
        self.library = CutoutLibrary(training_items(root))
        self.size, self.absent = size, absent

    def draw(self, rng: np.random.Generator, twins: bool = False) -> Scene:
        """Draw a scene of one to four objects.

        Args:
            rng: Random generator.
            twins: Whether the first object occurs two or three times.
        """
        studio = Studio(self.library, rng, self.size)
        cutouts = studio.objects(int(rng.integers(1, 3 if twins else 5)))
        if twins:
            cutouts += [cutouts[0]] * int(rng.integers(1, 3))
        scene = studio.scene(cutouts, extents=(0.18, 0.45), match=float(rng.uniform(0.1, 0.8)))
        return self._to_scene(scene)

    def matching_pair(self, rng: np.random.Generator) -> tuple[Scene, Scene, int]:
        """Draw a large object as a reference, and a scene that contains it.

        Returns:
            The reference, the scene, and the index of the object in the scene.
        """
        studio = Studio(self.library, rng, self.size)
        cutouts = studio.objects(int(rng.integers(1, 4)))
        index = int(rng.integers(len(cutouts)))
        reference = studio.scene([cutouts[index]], extents=(0.35, 0.8))
        scene = studio.scene(cutouts, extents=(0.2, 0.4))
        return self._to_scene(reference), self._to_scene(scene), index

    def _to_scene(self, scene: PhotoScene) -> Scene:
        regions = tuple(
            Region((OBJECT,) if placement.cutout.noun == OBJECT else (placement.cutout.noun, OBJECT), mask)
            for placement, mask in zip(scene.placements, scene.masks, strict=True)
        )
        return Scene(np.asarray(scene.image), regions, self.absent)


class Drawings:
    """Scenes of ConceptShapes.

    Args:
        size: Side length of all images in pixels.
        absent: Nouns that no scene contains.
    """

    def __init__(self, size: int, absent: tuple[str, ...]) -> None:
        self.benchmark = ConceptShapes("train", length=100_000_000, size=size)
        self.absent = absent

    def draw(self, number: int) -> Scene:
        """Return a scene, which depends only on its number."""
        drawn = self.benchmark.task(number).scene
        regions = tuple(
            Region(tuple(item.look.phrase.split()), item.mask) for item in drawn.objects if item.mask.any()
        )
        return Scene(drawn.pixels, regions, self.absent, drawn)
