"""Training examples of the VLM from scenes and tasks of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from conceptseg_hf.boxes import Box
from conceptseg_hf.completion import format_completion
from conceptseg_hf.images import mask_to_image
from conceptseg_hf.processing_conceptseg import CoordinateFrame
from conceptseg_hf.references import Reference

from ..from_scratch.example_writer import BaseExampleWriter, Entry, TrainingImage, box_targets
from ..from_scratch.masks import bounding_box
from ..from_scratch.tokenizers import COORDINATE_SCALE
from ..from_scratch.vlm_examples import AttentionTarget, TrainingExample
from .dense import MARKED, dense_target
from .scenes import Region, Scene
from .tasks import TrainingTask

_MIN_PIXELS = 24  # size of the smallest regions in perception examples


@dataclass(frozen=True)
class TaskPrompt:
    """Images and instruction of a task.

    Attributes:
        images: The mosaic, if there are references, and the target.
        instruction: The instruction.
        check: Box of the withheld reference on the mosaic in text units; None if no box is withheld.
        marked: The marked objects on the mosaic.
    """

    images: list[TrainingImage]
    instruction: str
    check: Box | None = None
    marked: list[Region] = field(default_factory=list)


class PhotoExampleWriter(BaseExampleWriter):
    """Convert scenes and tasks to training examples."""

    # Perception

    def naming(self, rng: np.random.Generator, scene: Scene) -> TrainingExample:
        """Name and locate the regions of an image whose answer is unique, in random order."""
        answers = [region.nouns[:1] for region in scene.regions]
        entries = [
            Entry(region.nouns[0], {0: region.mask}, 0, region.mask)
            for region, answer in zip(scene.regions, answers, strict=True)
            if answer and answers.count(answer) == 1 and region.mask.sum() >= _MIN_PIXELS
        ]
        # The order is random, so the first word of a phrase may be that of any object if there are several.
        return self.listing(
            rng, "mark objects", [self._scene_image(scene)], entries, first_guided=int(len(entries) > 1)
        )

    def finding(self, rng: np.random.Generator, scene: Scene) -> TrainingExample:
        """Locate nouns, each with the box of all regions that it describes."""
        entries = [
            Entry(noun, {}, 0, mask) for noun, mask in scene.masks().items() if mask.sum() >= _MIN_PIXELS
        ]
        return self.listing(rng, "find objects", [self._scene_image(scene)], entries)

    def naming_marked(self, rng: np.random.Generator, task: TrainingTask) -> TrainingExample:
        """Name and locate the objects of a mosaic that are marked by red boxes."""
        mosaic, frame = self.mosaic(task.references)
        regions = self._mosaic_regions(task, frame)
        entries = [
            Entry(region.nouns[0], {0: region.mask}, 0, region.mask)
            for region in regions
            if MARKED in region.nouns and region.mask.any()
        ]
        image = self._image(mosaic, regions, ())
        return self.listing(rng, "marked objects", [image], entries, first_guided=1)

    def matching(
        self, rng: np.random.Generator, reference: Scene, scene: Scene, index: int
    ) -> TrainingExample:
        """Locate the object that is marked in a reference, the first region of it.

        Args:
            rng: Random generator.
            reference: The reference.
            scene: The target.
            index: Index of the same object in the target.
        """
        first, region = reference.regions[0], scene.regions[index]
        mosaic, _ = self.mosaic(
            [Reference(Image.fromarray(reference.pixels), mask=mask_to_image(first.mask), role="support")]
        )
        marked = [Region((*first.nouns, MARKED), first.mask), *reference.regions[1:]]
        entries = [Entry(region.nouns[0], {0: first.mask, 1: region.mask}, 1, region.mask)]
        images = [self._image(mosaic, marked, reference.absent), self._scene_image(scene)]
        return self.listing(rng, "same objects", images, entries)

    # Tasks

    def task(self, task: TrainingTask) -> TrainingExample:
        """Create an example of a complete task: mosaic and target, the instruction, and the completion."""
        prompt = self.task_prompt(task)
        images, check = prompt.images, prompt.check
        present = bool(task.mask.any())
        box = self.canvas_box_to_text(bounding_box(task.mask)) if present else None
        text = format_completion(task.think, task.rule, check, box, task.answer, COORDINATE_SCALE)
        completion = [*self.token_ids(text), self.ids["<|im_end|>"]]
        attention_targets: list[AttentionTarget] = []
        if check is not None:
            attention_targets += box_targets(
                completion.index(self.ids["<check>"]), {0: self.text_box_to_tokens(check)}
            )
        if present:
            target = {len(images) - 1: self.mask_to_tokens(task.mask)}
            attention_targets += box_targets(completion.index(self.ids["<bbox>"]), target)
            # The class of the answer can also be read from the references.
            if prompt.marked:
                target[0] = self.mask_to_tokens(np.any([region.mask for region in prompt.marked], axis=0))
            length = len(self.token_ids(task.answer))
            for end in (completion.index(self.ids["</think>"]), completion.index(self.ids["</answer>"])):
                attention_targets += [AttentionTarget(i, target) for i in range(end - length, end)]
        return TrainingExample(
            tuple(image.pixels for image in images),
            self.prompt_ids(prompt.instruction, len(images)),
            completion,
            completion,
            tuple(attention_targets),
            tuple(image.dense for image in images),
        )

    def task_prompt(self, task: TrainingTask) -> TaskPrompt:
        """Return the images and the instruction of a task."""
        target = self._image(task.pixels, task.regions, task.absent)
        if not task.references:
            return TaskPrompt([target], self.processor.template.fill("no_reference", task.prompt))
        mosaic, frame = self.mosaic(task.references)
        regions = self._mosaic_regions(task, frame)
        return TaskPrompt(
            [self._image(mosaic, regions, ()), target],
            self.processor.instruction(task.prompt, frame),
            frame.check_box,
            [region for region in regions if MARKED in region.nouns],
        )

    # Parts

    def _mosaic_regions(self, task: TrainingTask, frame: CoordinateFrame) -> list[Region]:
        """Return the marked objects of the references on the mosaic; the proxy query's is not marked."""
        layout = frame.layout
        assert layout is not None  # there are references
        regions = []
        for index, mask in enumerate(task.marked):
            if mask is None or frame.cell_of_reference[index] not in layout:
                continue
            left, top, right, bottom = layout.cell(frame.cell_of_reference[index])
            rows = np.arange(bottom - top) * mask.shape[0] // (bottom - top)
            columns = np.arange(right - left) * mask.shape[1] // (right - left)
            on_mosaic = np.zeros((self.size, self.size), dtype=bool)
            on_mosaic[top:bottom, left:right] = mask[rows][:, columns]
            nouns = (task.answer,) if index == frame.proxy else (task.answer, MARKED)
            if on_mosaic.any():
                regions.append(Region(nouns, on_mosaic))
        return regions

    def _scene_image(self, scene: Scene) -> TrainingImage:
        return self._image(scene.pixels, scene.regions, scene.absent)

    def _image(self, pixels: np.ndarray, regions: Sequence[Region], absent: Sequence[str]) -> TrainingImage:
        return TrainingImage(pixels, dense_target(regions, absent, self.size, self.grid))
