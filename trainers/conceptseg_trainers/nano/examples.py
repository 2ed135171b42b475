"""Training examples of the nano VLM: images, a text to complete, and targets of the attention to image tokens.

Perception examples are short: they name, find, match and locate objects, with many boxes per token. A task example is a
complete task as in inference, with mosaic, instruction and completion. Its images and prompt equal those of
`ConceptSegProcessor` (which is tested), but are created without its general code, which would take longer than a
training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from conceptseg_hf.boxes import Box
from conceptseg_hf.completion import format_completion
from conceptseg_hf.coordinates import CoordinateFrame
from conceptseg_hf.data.concept_shapes.families import Task
from conceptseg_hf.data.concept_shapes.rendering import COLORS, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import Look, Scene, draw_scene, make_objects, random_look
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.prompt_processing import PromptProcessor
from conceptseg_hf.references import Reference, Role

from ..from_scratch.example_writer import NUMBER_OFFSETS, BaseExampleWriter, Entry, TrainingImage, box_targets
from ..from_scratch.masks import bounding_box
from ..from_scratch.tokenizers import COORDINATE_SCALE
from ..from_scratch.vlm_examples import AttentionTarget, TrainingExample
from .dense import VisibleObject, dense_targets, visible_objects
from .referring import referring_expressions
from .tokenizers import short_processor

_NOISE = 0.15  # probability of replacing a color or texture word in the input of the VLM
_MIN_PIXELS = 12  # size of the smallest objects in perception examples


class ExampleWriter(BaseExampleWriter):
    """Convert scenes and tasks to training examples, with the tokenizer and template of a nano processor.

    Args:
        processor: The processor.
    """

    def __init__(self, processor: PromptProcessor) -> None:
        super().__init__(processor)
        self.short_processor = short_processor(processor)
        vocabulary = self.tokenizer.get_vocab()
        # Token ids of the colors, and of the textures.
        self._word_groups = [
            np.asarray([vocabulary[word] for word in words]) for words in (COLORS, TEXTURES[1:])
        ]
        self._look_words = {vocabulary[word] for word in (*COLORS, *TEXTURES[1:], *SHAPES)}

    # Perception

    def naming(
        self, rng: np.random.Generator, image: np.ndarray, objects: Sequence[VisibleObject]
    ) -> TrainingExample:
        """Name and locate the objects of an image that have a unique name, in random order."""
        names = [item.look.phrase for item in objects]
        entries = [
            Entry(name, {0: item.mask}, 0, item.mask)
            for item, name in zip(objects, names, strict=True)
            if names.count(name) == 1 and item.mask.sum() >= _MIN_PIXELS
        ]
        # The order is random, so the first word of a phrase may be that of any object.
        return self.listing(rng, "mark objects", [_training_image(image, objects)], entries, first_guided=1)

    def finding(
        self, rng: np.random.Generator, image: np.ndarray, objects: Sequence[VisibleObject]
    ) -> TrainingExample:
        """Locate phrases that describe one or several objects of an image, each with the box of all of them."""
        masks: dict[str, np.ndarray] = {}
        for item in objects:
            words = item.look.phrase.split() if item.look.kind else some_words(rng, item.look)
            mask = np.any([other.mask for other in objects if other.look.matches(words)], axis=0)
            if mask.sum() >= _MIN_PIXELS:
                masks[" ".join(words)] = mask
        entries = [Entry(phrase, {}, 0, mask) for phrase, mask in masks.items()]
        return self.listing(rng, "find objects", [_training_image(image, objects)], entries, noise=False)

    def referring(self, rng: np.random.Generator, task: Task) -> TrainingExample:
        """Locate the objects that the rule of a task and other phrases refer to, in the target scene alone.

        Half of the examples name the object between the phrase and its box.
        """
        phrases = dict(referring_expressions(rng, task.scene.objects, SIDE))
        masks = {phrase: (item.look.phrase, item.mask) for phrase, item in phrases.items()}
        if task.mask.any():
            masks[task.rule] = (task.answer, task.mask)
        named = rng.random() < 0.5
        entries = [
            Entry(f"{phrase} : {name}" if named else phrase, {}, 0, mask)
            for phrase, (name, mask) in masks.items()
            if mask.sum() >= _MIN_PIXELS
        ]
        return self.listing(rng, "find objects", [_scene_image(task.scene)], entries, noise=False)

    def naming_mosaic(self, rng: np.random.Generator, task: Task) -> TrainingExample:
        """Name and locate the objects of a mosaic, which trains the boxes of `<check>` in small cells."""
        mosaic, objects, _ = self._mosaic(task)
        return self.naming(rng, mosaic, objects)

    def naming_marked(self, rng: np.random.Generator, task: Task) -> TrainingExample:
        """Name and locate the objects of a mosaic that are marked by red boxes."""
        mosaic, objects, _ = self._mosaic(task)
        entries = [Entry(item.look.phrase, {0: item.mask}, 0, item.mask) for item in objects if item.marked]
        return self.listing(
            rng, "marked objects", [_training_image(mosaic, objects)], entries, first_guided=1
        )

    def matching(self, rng: np.random.Generator) -> TrainingExample:
        """Name objects that are marked in a mosaic, and locate them in another scene."""
        looks: list[Look] = []
        while len(looks) < int(rng.integers(2, 6)):
            look = random_look(rng)
            if look not in looks:
                looks.append(look)
        scene = draw_scene(rng, SIDE, make_objects(rng, SIDE, looks))
        count = min(int(rng.choice([1, 1, 2, 4])), len(looks))
        cell = SIDE if count == 1 else SIDE // 2
        references: dict[int, tuple[Scene, Box]] = {}
        while len(references) < count:
            index = int(rng.integers(len(looks)))
            others = [random_look(rng) for _ in range(int(rng.integers(0, 3)))]
            others = [other for other in others if other != looks[index]]
            reference = draw_scene(rng, cell, make_objects(rng, cell, [looks[index], *others]))
            if (box := reference.objects[0].box) is not None:
                references.setdefault(index, (reference, box))
        mosaic, objects, _ = self.compose(list(references.values()), role="support")
        entries = [
            Entry(
                looks[index].phrase,
                {0: _union([o.mask for o in objects if o.marked and o.look == looks[index]]), 1: item.mask},
                1,
                item.mask,
            )
            for index in references
            if (item := scene.objects[index]).mask.sum() >= _MIN_PIXELS
        ]
        images = [_training_image(mosaic, objects), _scene_image(scene)]
        return self.listing(rng, "same objects", images, entries, first_guided=1)

    # Tasks

    def task(
        self,
        rng: np.random.Generator,
        task: Task,
        chosen: int | None = None,
        short: bool = False,
        open_choice: bool = False,
    ) -> TrainingExample:
        """Create an example of a complete task: mosaic and target, the instruction, and the completion.

        Args:
            rng: Random generator.
            task: The task.
            chosen: Index of an object of the target scene. If given, the completion describes this object instead of
                the correct one; rule and check do not change.
            short: Whether to omit rule, check, and the reasoning about the references.
            open_choice: Whether the tokens that choose an object (the end of the reasoning, box and answer) are not
                trained.
        """
        processor = self.short_processor if short else self.processor
        mask, answer, think = described_object(task, chosen)
        if short:
            think = f"it is the {answer}"
        images = [_scene_image(task.scene)]
        check: Box | None = None
        marked: list[VisibleObject] = []
        if task.references:
            mosaic, objects, frame = self._mosaic(task)
            instruction = processor.instruction(task.prompt, frame)
            images.insert(0, _training_image(mosaic, objects))
            check = None if short else frame.check_box
            marked = [item for item in objects if item.marked]
        else:
            instruction = processor.template.fill("no_reference", task.prompt)
        present = bool(mask.any())
        text = format_completion(
            think,
            None if short else task.rule,
            check,
            self.canvas_box_to_text(bounding_box(mask)) if present else None,
            answer,
            COORDINATE_SCALE,
        )
        completion = [*self.token_ids(text), self.ids["<|im_end|>"]]
        attention_targets: list[AttentionTarget] = []
        if check is not None:
            start = completion.index(self.ids["<check>"])
            attention_targets += box_targets(start, {0: self.text_box_to_tokens(check)})
        if present:
            target = {len(images) - 1: self.mask_to_tokens(mask)}
            start = completion.index(self.ids["<bbox>"])
            attention_targets += box_targets(start, target)
            attention_targets += self._word_targets(completion, think, answer, target, marked)
        return TrainingExample(
            tuple(image.pixels for image in images),
            self.prompt_ids(instruction, len(images), processor),
            completion,
            self.with_noise(rng, completion),
            tuple(attention_targets),
            tuple(image.dense for image in images),
            self._choice(completion, answer) if open_choice else frozenset(),
        )

    def _choice(self, completion: Sequence[int], answer: str) -> frozenset[int]:
        """Return the indices of the tokens that choose an object: the answer, also in the reasoning, and the box."""
        length = len(self.token_ids(answer))
        ends = [completion.index(self.ids[tag]) for tag in ("</think>", "</answer>")]
        indices = {i for end in ends for i in range(end - length, end)}
        if self.ids["<bbox>"] in completion:
            start = completion.index(self.ids["<bbox>"])
            indices.update(start + offset for offset in NUMBER_OFFSETS)
        return frozenset(indices)

    def _word_targets(
        self,
        completion: Sequence[int],
        think: str,
        answer: str,
        target: dict[int, np.ndarray],
        marked: Sequence[VisibleObject],
    ) -> list[AttentionTarget]:
        """Return the attention targets of words.

        The words of the answer, which also ends the reasoning, are read from the target. Other words of the reasoning
        that describe all marked objects are read from these.
        """
        attention_targets: list[AttentionTarget] = []
        shared = {0: self.mask_to_tokens(_union([item.mask for item in marked]))} if marked else {}
        # If the answer also describes all marked objects, its words can be read from these as well.
        describes_marked = marked and all(item.look.matches(answer.split()) for item in marked)
        answer_tokens = {**shared, **target} if describes_marked else target
        length = len(self.token_ids(answer))
        for end in (completion.index(self.ids["</think>"]), completion.index(self.ids["</answer>"])):
            attention_targets += [AttentionTarget(i, answer_tokens) for i in range(end - length, end)]
        for position, word in enumerate(think.split()[:-length], start=1):
            is_attribute = word in COLORS or word in SHAPES or word in TEXTURES[1:]
            if marked and is_attribute and all(item.look.matches([word]) for item in marked):
                attention_targets.append(AttentionTarget(position, shared))
        return attention_targets

    # Parts

    def _mosaic(self, task: Task) -> tuple[np.ndarray, list[VisibleObject], CoordinateFrame]:
        """Return the mosaic of a task's references, its objects, and its coordinate frame."""
        return self.compose(task.references)

    def compose(
        self, references: Sequence[tuple[Scene, Box | None]], role: Role = "auto"
    ) -> tuple[np.ndarray, list[VisibleObject], CoordinateFrame]:
        """Return the mosaic of references with the given role, its objects, and its coordinate frame."""
        mosaic, frame = self.mosaic(
            [Reference(Image.fromarray(scene.pixels), box=box, role=role) for scene, box in references]
        )
        layout = frame.layout
        assert layout is not None  # there are references
        cells = [layout.cell(cell) for cell in frame.cell_of_reference]
        boxes = [None if i == frame.proxy else box for i, (_, box) in enumerate(references)]
        return mosaic, mosaic_objects([scene for scene, _ in references], boxes, cells), frame

    def with_noise(self, rng: np.random.Generator, completion: Sequence[int]) -> list[int]:
        """Replace some color and texture words that are followed by another word of the same look.

        The second word must be read from the image instead of being predicted from the first one. Otherwise, the VLM
        would never predict pairs that are held out from training.
        """
        noisy = list(completion)
        for group in self._word_groups:
            for i in np.flatnonzero(np.isin(completion[:-1], group)):
                if completion[i + 1] in self._look_words and rng.random() < _NOISE:
                    noisy[i] = int(group[int(rng.integers(len(group)))])
        return noisy


def described_object(task: Task, chosen: int | None = None) -> tuple[np.ndarray, str, str]:
    """Return mask, answer and reasoning of the target, or of the object of the scene with the index `chosen`."""
    if chosen is None:
        return task.mask, task.answer, task.think
    item = task.scene.objects[chosen]
    answer = answer_for(task, item.look)
    return item.mask, answer, task.think.removesuffix(task.answer) + answer


def random_object(rng: np.random.Generator, scene: Scene) -> int:
    """Return the index of a random visible object."""
    visible = [i for i, item in enumerate(scene.objects) if item.mask.any()]
    return visible[int(rng.integers(len(visible)))]


def answer_for(task: Task, look: Look) -> str:
    """Return an answer that describes an object of the given look, as specific as the answer of the task."""
    return look.shape if len(task.answer.split()) == 1 and not look.kind else look.phrase


def some_words(rng: np.random.Generator, look: Look) -> list[str]:
    """Draw one or more attributes of a look; "object" replaces a missing shape."""
    while True:
        keep = rng.random(3) < (0.5, 0.6, 0.7)
        words = [
            word
            for word, kept in zip((look.texture, look.color, look.shape), keep, strict=True)
            if kept and word != "plain"
        ]
        if words:
            return words if keep[2] else [*words, "object"]


def _union(masks: Sequence[np.ndarray]) -> np.ndarray:
    return np.any(masks, axis=0)


def mosaic_objects(
    scenes: Sequence[Scene], boxes: Sequence[Box | None], cells: Sequence[tuple[int, int, int, int]]
) -> list[VisibleObject]:
    """Return the objects of reference scenes on the mosaic.

    Args:
        scenes: The reference scenes.
        boxes: For each scene the box that is drawn on the mosaic, or None; the object of this box is marked.
        cells: For each scene the rectangle of its cell in canvas pixels.
    """
    objects: list[VisibleObject] = []
    for scene, box, (left, top, right, bottom) in zip(scenes, boxes, cells, strict=True):
        rows = np.arange(bottom - top) * scene.pixels.shape[0] // (bottom - top)
        columns = np.arange(right - left) * scene.pixels.shape[1] // (right - left)
        for item in scene.objects:
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            mask[top:bottom, left:right] = item.mask[rows][:, columns]
            objects.append(VisibleObject(item.look, mask, box is not None and item.box == box))
    return objects


def _training_image(pixels: np.ndarray, objects: Sequence[VisibleObject]) -> TrainingImage:
    return TrainingImage(pixels, dense_targets(objects))


def _scene_image(scene: Scene) -> TrainingImage:
    return _training_image(scene.pixels, visible_objects(scene))
