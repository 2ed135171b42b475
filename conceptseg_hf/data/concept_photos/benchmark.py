"""ConceptPhotos as a sequence of samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ...boxes import mask_to_box
from ...images import mask_to_image
from ...references import Reference
from ..generated import GeneratedBenchmark
from ..layouts.photos import index_files
from ..sample import ConceptSample
from ..suite import SOURCES
from .cutouts import CutoutLibrary
from .families import FAMILIES, PhotoTask, Studio, coexistence

NAME = "concept-photos"
SPLITS = {"train": 0, "test": 1}
_LENGTHS = {"train": 1_000_000, "test": 1_000}


class ConceptPhotos(GeneratedBenchmark):
    """Scenes composed of photographs with one concept to segment in each.

    Objects are cut out of the photographs of the benchmark `photos` by their ground-truth masks and pasted into other
    photographs, so that concepts that depend on several objects or images have exact masks. The splits use different
    photographs. Samples are a function of their index and cycle through the families, so any prefix is balanced.

    Args:
        root: Folder of the benchmark `photos`.
        split: `"train"` or `"test"`.
        length: Number of samples; defaults to the length of the split.
        size: Side length of all images in pixels.
        seed: Random seed.

    Raises:
        ValueError: If the split does not exist, the size is less than 64 pixels, or the folder has no objects.
        MissingFilesError: If the folder has no datasets.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str = "test",
        length: int | None = None,
        size: int = 320,
        seed: int = 42,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"ConceptPhotos: no split is named {split!r}; use one of {', '.join(SPLITS)}.")
        if size < 64:
            raise ValueError(f"ConceptPhotos: size is {size}, which is too small; use at least 64 pixels.")
        self.name, self.split, self.size, self.seed = NAME, split, size, seed
        self.root = Path(root)
        self.length = _LENGTHS[split] if length is None else length
        self.library = CutoutLibrary(index_files(self.root, SOURCES["photos"], split).items)

    def generate(self, index: int) -> ConceptSample:
        """Generate the sample at an index of 0 or more."""
        level, group, family = FAMILIES[index % len(FAMILIES)]
        task = self.task(index)
        return ConceptSample(
            image=task.image,
            mask=mask_to_image(task.mask),
            prompt=task.prompt,
            level=level,
            group=group,
            family=family.__name__,
            references=[
                Reference(image, mask=None if mask is None else mask_to_image(mask))
                for image, mask in task.references
            ],
            dataset=NAME,
            sample_id=f"{self.split}-{index:06d}",
            box=mask_to_box(task.mask),
            think=task.think,
            rule=task.rule,
            answer=task.answer,
            split=self.split,
            candidates=task.candidates,
        )

    def task(self, index: int) -> PhotoTask:
        """Return the task of a sample."""
        round_number, position = divmod(index, len(FAMILIES))
        family = FAMILIES[position][2]
        first = next(i for i, (_, _, other) in enumerate(FAMILIES) if other is family)
        is_variant = family is coexistence
        # Variants of a target share its random numbers.
        seeds = [self.seed, SPLITS[self.split], round_number, first if is_variant else position]
        studio = Studio(self.library, np.random.default_rng(seeds), self.size)
        return family(studio, variant=position - first) if is_variant else family(studio)
