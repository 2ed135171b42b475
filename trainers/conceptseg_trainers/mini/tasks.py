"""Complete tasks with ground-truth completions: photographs, compositions and drawings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from conceptseg_hf.data import ConceptPhotos, ConceptShapes
from conceptseg_hf.data.concept_photos.cutouts import CutoutLibrary
from conceptseg_hf.data.files import FileItem
from conceptseg_hf.data.ground_truths import MaskFile
from conceptseg_hf.data.pools import reference_count
from conceptseg_hf.images import load_image, load_mask, mask_to_image
from conceptseg_hf.references import Reference

from .leaks import training_items
from .nouns import OBJECT, nouns_of
from .photographs import Part, PhotographLibrary
from .scenes import Region

_NO_REFERENCES = 0.25  # fraction of the tasks of photographs without references, if they are not listed
_MAX_TRIES = 8
_LENGTH = 100_000_000

FIRST_HELD_OUT = 50_000_000
"""First number of compositions that are not trained."""

_DRAWN, _COMPOSED = 0.15, 0.3  # fractions of the tasks


@dataclass(frozen=True)
class TrainingTask:
    """A task with its ground truth.

    Attributes:
        pixels: (S, S, 3) uint8, the target image.
        mask: (S, S) bool, what is to be segmented; empty if it is absent.
        prompt: The prompt.
        references: The references.
        marked: For each reference the mask of its marked object, or None.
        think: Ground-truth reasoning; ends with the answer.
        rule: Ground-truth rule.
        answer: Ground-truth answer.
        regions: The regions of the target image that are known.
        absent: Nouns that describe nothing in the target image.
    """

    pixels: np.ndarray
    mask: np.ndarray
    prompt: str
    references: tuple[Reference, ...]
    marked: tuple[np.ndarray | None, ...]
    think: str
    rule: str
    answer: str
    regions: tuple[Region, ...]
    absent: tuple[str, ...] = ()


class TaskSource:
    """Tasks by number; a task depends only on its number.

    Args:
        root: Folder of the benchmark `photos`.
        part: Part of the training photographs.
        size: Side length S of all images in pixels.
    """

    def __init__(self, root: Path, part: Part, size: int) -> None:
        self.size = size
        self.photographs = PhotographLibrary(root, part, size)
        self._compositions = ConceptPhotos(root, "train", length=_LENGTH, size=size)
        self._compositions.library = CutoutLibrary(training_items(root))
        self._drawings = ConceptShapes("train", length=_LENGTH, size=size)
        # References are training photographs in all parts.
        self._pools: dict[str, list[FileItem]] = {}
        for item in PhotographLibrary(root, "train", size).items:
            self._pools.setdefault(item.concept, []).append(item)
        self._by_dataset: dict[str, list[FileItem]] = {}
        for item in self.photographs.items:
            self._by_dataset.setdefault(item.dataset, []).append(item)

    def task(self, number: int) -> TrainingTask:
        """Return a task."""
        rng = np.random.default_rng([29, number])
        kind = rng.random()
        if kind < _DRAWN:
            return self._drawing(number)
        if kind < _DRAWN + _COMPOSED:
            return self.composition(number)
        return self._random_photograph(rng)

    def _random_photograph(self, rng: np.random.Generator) -> TrainingTask:
        names = sorted(self._by_dataset)
        weights = np.sqrt([len(self._by_dataset[name]) for name in names])
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        for _ in range(_MAX_TRIES):
            items = self._by_dataset[name]
            task = self.photograph(rng, items[int(rng.integers(len(items)))])
            if task.mask.any():
                break
        return task

    def photograph(self, rng: np.random.Generator, item: FileItem, augment: bool = True) -> TrainingTask:
        """Return the task of a photograph.

        Args:
            rng: Random generator of the references and the augmentation.
            item: The sample; its references are listed, or drawn from its class.
            augment: Whether to crop, mirror and recolor the target image.
        """
        nouns = nouns_of(item)
        answer = nouns[0] if nouns else "new object"
        # Images of one place are compared pixel by pixel.
        is_pair = bool(item.references) and item.references[0].ground_truth is None and not nouns
        photograph = self.photographs.photograph(item)
        scene = (
            self.photographs.augmented(rng, photograph)
            if augment and not is_pair
            else self.photographs.scene(photograph)
        )
        if nouns:
            mask = scene.masks().get(answer, np.zeros((self.size, self.size), dtype=bool))
        else:
            mask = np.zeros((self.size, self.size), dtype=bool)
            for region in scene.regions:
                mask = mask | region.mask
        images, marked = self._references(rng, item, augment)
        references = tuple(
            Reference(image, mask=None if mark is None else mask_to_image(mark))
            for image, mark in zip(images, marked, strict=True)
        )
        if is_pair:
            think = (
                f"the reference shows the place without one of the objects and the new one is the {answer}"
            )
            rule = "find what is only in the target image"
        elif not images:
            think, rule = f"here it is the {answer}", f"find the {answer}"
        elif marked[0] is None:
            think, rule = f"both pictures show the {answer}", f"find the {answer}"
        else:
            think = f"the references mark the {answer} and here it is the {answer}"
            rule = f"find the {answer}"
        return TrainingTask(
            scene.pixels,
            mask,
            item.prompt,
            references,
            tuple(marked),
            think,
            rule,
            answer,
            scene.regions,
            scene.absent,
        )

    def _references(
        self, rng: np.random.Generator, item: FileItem, augment: bool
    ) -> tuple[list[Image.Image], list[np.ndarray | None]]:
        """Return the images and masks of references, of S x S pixels."""
        files = [(reference.image, reference.ground_truth) for reference in item.references]
        if not files and not (augment and rng.random() < _NO_REFERENCES):
            pool = [other for other in self._pools.get(item.concept, ()) if other.image != item.image]
            count = min(reference_count(len(pool) + 1), len(pool))
            files = [
                (pool[int(i)].image, pool[int(i)].ground_truth)
                for i in rng.choice(len(pool), count, replace=False)
            ]
        images: list[Image.Image] = []
        marked: list[np.ndarray | None] = []
        size = (self.size, self.size)
        for path, ground_truth in files:
            image = load_image(path)
            mark = None
            if isinstance(ground_truth, MaskFile):
                full = mask_to_image(load_mask(ground_truth.path, image.size))
                mark = np.asarray(full.resize(size, Image.Resampling.BOX)) > 127
                if not mark.any():
                    continue
            images.append(image.resize(size, Image.Resampling.BICUBIC))
            marked.append(mark)
        return images, marked

    def composition(self, number: int) -> TrainingTask:
        """Return the task of `ConceptPhotos` with this index."""
        task = self._compositions.task(number)
        named = (OBJECT,) if task.answer == OBJECT else (task.answer, OBJECT)
        regions = [Region(named, task.mask)] if task.mask.any() else []
        regions += [
            Region((OBJECT,), candidate.mask)
            for candidate in task.candidates
            if candidate.mask.any() and candidate.mask is not task.mask
        ]
        return TrainingTask(
            np.asarray(task.image),
            task.mask,
            task.prompt,
            tuple(
                Reference(image, mask=None if mark is None else mask_to_image(mark))
                for image, mark in task.references
            ),
            tuple(mark for _, mark in task.references),
            task.think,
            task.rule,
            task.answer,
            tuple(regions),
        )

    def _drawing(self, number: int) -> TrainingTask:
        task = self._drawings.task(number)
        regions = tuple(
            Region(tuple(item.look.phrase.split()), item.mask)
            for item in task.scene.objects
            if item.mask.any()
        )
        return TrainingTask(
            task.scene.pixels,
            task.mask,
            task.prompt,
            tuple(Reference(Image.fromarray(scene.pixels), box=box) for scene, box in task.references),
            tuple(
                None if box is None else next(item.mask for item in scene.objects if item.box == box)
                for scene, box in task.references
            ),
            task.think,
            task.rule,
            task.answer,
            regions,
        )
