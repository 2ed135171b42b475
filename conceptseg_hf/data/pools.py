"""Reference images in files, and the pools that they are drawn from."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..boxes import mask_to_box
from ..images import load_oriented_image, mask_to_image, try_image
from ..mask_checks import describe_size_mismatch, is_similar_size
from ..references import Reference, no_foreground_message, read_reference
from .ground_truths import BoxGroundTruth, GroundTruth, MaskFile, PixelBox, Size, resize


@dataclass(frozen=True)
class FileReference:
    """A reference image, with its truth where there is one."""

    image: Path
    ground_truth: GroundTruth | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it reads."""
        return self.image, *(() if self.ground_truth is None else self.ground_truth.files)

    def read(self) -> Reference:
        """As the processor takes it; files that it can open itself stay paths.

        Everything is read and tried here, so that a reference that cannot be used is found before it is shown.

        Raises:
            OSError, ValueError: If image or truth cannot be used; the message names the file.
        """
        if self.ground_truth is None:
            try_image(self.image)
            return Reference(self.image)
        if isinstance(self.ground_truth, MaskFile):
            size, orientation = try_image(self.image)
            mask, fits = _read_mask(self.ground_truth, size, orientation)
            return Reference(self.image, mask=self.ground_truth.path if fits else mask_to_image(mask))
        image, orientation = load_oriented_image(self.image)
        if isinstance(self.ground_truth, (BoxGroundTruth, PixelBox)):
            reference = Reference(image, box=self.ground_truth.box(image.size))
            try:
                read_reference(reference)
            except ValueError as error:
                raise ValueError(f"reference {str(self.image)!r}: {error}") from error
            return reference
        mask, _ = _read_mask(self.ground_truth, image.size, orientation)
        return Reference(image, box=mask_to_box(mask))


def _read_mask(ground_truth: GroundTruth, size: Size, orientation: int) -> tuple[np.ndarray, bool]:
    """The mask, (H, W) bool, at the size of the image, and whether it is stored at that size."""
    mask, _ = ground_truth.read(size, orientation)
    stored = mask.shape[::-1]
    if stored != size and not is_similar_size(stored, size):
        raise ValueError(describe_size_mismatch(ground_truth.name, stored, size))
    if not mask.any():
        raise ValueError(no_foreground_message(ground_truth.files[0]))
    return resize(mask, size), stored == size


class ReferencePool(ABC):
    """Images of which references are drawn."""

    reads_files = False
    """Whether drawing opens files."""

    @abstractmethod
    def draw(self, concept: str, rng: random.Random, exclude: Path) -> list[FileReference]:
        """Draws references of a class without replacement: 1 if the class has 2 images, else 4 or all there are.

        Args:
            concept: The class.
            rng: Source of chance.
            exclude: The target, which is never its own reference.
        """

    @abstractmethod
    def spares(
        self, concept: str, rng: random.Random, exclude: Path, drawn: Collection[FileReference]
    ) -> Iterator[FileReference]:
        """The others of a class in random order, to take the places of references that cannot be used.

        Args:
            concept: The class.
            rng: Source of chance, in the state that `draw` has left.
            exclude: The target.
            drawn: What `draw` has returned.
        """

    @abstractmethod
    def references(self, concept: str) -> Iterable[FileReference]:
        """Everything that can be drawn for a class."""

    def has_reference(self, concept: str, exclude: Path) -> bool:
        """Whether there is at least one reference; cheap, and True where only reading could tell."""
        return True


def reference_count(class_size: int) -> int:
    """How many references a class of this size gives (as the paper's data loader): 1 of 2 images, else 4."""
    return 1 if class_size == 2 else 4


def draw_with_replacement(
    everything: Sequence[FileReference], rng: random.Random, exclude: Path
) -> list[FileReference]:
    """Draws references of a class with replacement, as the released code: 1 if the class has 2 images, else 4.

    Each is drawn until it is not the target, so that a class with a single other image gives it four times; a class
    with none gives none.

    Args:
        everything: All images of the class.
        rng: Source of chance; the released code has one for all samples, in their order.
        exclude: The target, which is never its own reference.
    """
    if all(reference.image == exclude for reference in everything):
        return []
    drawn = []
    for _ in range(reference_count(len(everything))):
        reference = rng.choice(everything)
        while reference.image == exclude:
            reference = rng.choice(everything)
        drawn.append(reference)
    return drawn


class ClassPool(ReferencePool):
    """References by class, all known beforehand.

    Args:
        references: The references of each class.
    """

    def __init__(self, references: Mapping[str, Sequence[FileReference]]) -> None:
        self._references = references
        self._copies = {
            concept: Counter(reference.image for reference in everything)
            for concept, everything in references.items()
        }

    def draw(self, concept: str, rng: random.Random, exclude: Path) -> list[FileReference]:
        """See `ReferencePool.draw`."""
        everything = self._references.get(concept, ())
        count = reference_count(len(everything))
        # As many more as could be the target itself: the rest is then a fair draw among the others.
        copies = self._copies[concept][exclude] if everything else 0
        drawn = rng.sample(everything, min(count + copies, len(everything)))
        return [reference for reference in drawn if reference.image != exclude][:count]

    def spares(
        self, concept: str, rng: random.Random, exclude: Path, drawn: Collection[FileReference]
    ) -> Iterator[FileReference]:
        """See `ReferencePool.spares`."""
        everything = self._references.get(concept, ())
        for reference in rng.sample(everything, len(everything)):
            if reference.image != exclude and reference not in drawn:
                yield reference

    def references(self, concept: str) -> Iterable[FileReference]:
        """See `ReferencePool.references`."""
        return self._references.get(concept, ())

    def has_reference(self, concept: str, exclude: Path) -> bool:
        """See `ReferencePool.knows`."""
        everything = self._references.get(concept, ())
        return bool(everything) and len(everything) > self._copies[concept][exclude]
