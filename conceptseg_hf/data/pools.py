"""Reference images in files, and the pools from which they are drawn."""

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
    """A reference image, with its ground truth if there is one."""

    image: Path
    ground_truth: GroundTruth | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return self.image, *(() if self.ground_truth is None else self.ground_truth.files)

    def read(self) -> Reference:
        """Read the reference in the form that the processor accepts; files that it can open itself stay paths.

        All files are read and checked, so that an unusable reference is detected before it is passed to a model.

        Raises:
            OSError, ValueError: If the image or ground truth cannot be used; the message names the file.
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
    """Return the mask, (H, W) bool, at the size of the image, and whether it is stored at that size."""
    mask, _ = ground_truth.read(size, orientation)
    stored_size = mask.shape[::-1]
    if stored_size != size and not is_similar_size(stored_size, size):
        raise ValueError(describe_size_mismatch(ground_truth.name, stored_size, size))
    if not mask.any():
        raise ValueError(no_foreground_message(ground_truth.files[0]))
    return resize(mask, size), stored_size == size


class ReferencePool(ABC):
    """Images from which references are drawn."""

    reads_files = False
    """Whether drawing opens files."""

    @abstractmethod
    def draw(self, concept: str, rng: random.Random, exclude: Path) -> list[FileReference]:
        """Draw references of a class without replacement: 1 if the class has 2 images, else at most 4.

        Args:
            concept: The class.
            rng: Random generator.
            exclude: The target image, which is never its own reference.
        """

    @abstractmethod
    def spares(
        self, concept: str, rng: random.Random, exclude: Path, drawn: Collection[FileReference]
    ) -> Iterator[FileReference]:
        """Iterate over the remaining references of a class in random order, as replacements for unusable ones.

        Args:
            concept: The class.
            rng: Random generator, in the state in which `draw` left it.
            exclude: The target image.
            drawn: The result of `draw`.
        """

    @abstractmethod
    def references(self, concept: str) -> Iterable[FileReference]:
        """Return all references that can be drawn for a class."""

    def has_reference(self, concept: str, exclude: Path) -> bool:
        """Whether there is at least one reference; this opens no files, and is True if only reading could decide."""
        return True


def reference_count(class_size: int) -> int:
    """Return the number of references of a class, as in the paper's data loader: 1 if it has 2 images, else 4."""
    return 1 if class_size == 2 else 4


def draw_with_replacement(
    everything: Sequence[FileReference], rng: random.Random, exclude: Path
) -> list[FileReference]:
    """Draw references of a class with replacement, as in the released code: 1 if the class has 2 images, else 4.

    Each draw is repeated while it gives the target. A class with one image, if that is not the target, gives it four
    times; a class without images other than the target gives no references.

    Args:
        everything: All references of the class.
        rng: Random generator; the released code uses one for all samples in order.
        exclude: The target image, which is never its own reference.
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
    """References by class, all listed in advance.

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
        # Draws as many more as there are copies of the target, so that the remaining ones are a uniform draw.
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
        """See `ReferencePool.has_reference`."""
        everything = self._references.get(concept, ())
        return bool(everything) and len(everything) > self._copies[concept][exclude]
