"""Training examples of the nano VLM: pictures, a text to continue, and where it should look while it writes.

Perception examples are short: they name, find, match and locate objects, with many boxes for little text. A task
example is a whole task as the model will meet it, with mosaic, instruction and completion. Its pictures and prompts are
exactly those of `ConceptSegProcessor` (tested); they are made here without its general machinery, which would cost more
than a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from conceptseg_hf.boxes import Box, mask_to_box
from conceptseg_hf.completion import format_box, format_completion
from conceptseg_hf.data.concept_shapes.families import Task
from conceptseg_hf.data.concept_shapes.rendering import COLORS, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import Look, Scene, draw_scene, make_objects, random_look
from conceptseg_hf.mosaic import compose_mosaic
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor, CoordinateFrame
from conceptseg_hf.references import Reference, resolve_references

from .dense import GRID, Visible, dense_targets, tokens_of, visible_objects
from .tokenizers import COORDINATE_SCALE, short_processor

_NOISE = 0.15  # probability that a color or texture word is another one where the VLM reads its own text
_MIN_PIXELS = 12  # smaller things are not asked for


@dataclass(frozen=True)
class Focus:
    """While the token at a place of the completion is being chosen, attention belongs on these image tokens.

    Attributes:
        position: Index of the token within the completion.
        tokens: Picture index -> (GRID * GRID,) bool; any of the pictures will do.
    """

    position: int
    tokens: dict[int, np.ndarray]


@dataclass(frozen=True)
class TrainingExample:
    """One training sequence.

    Attributes:
        pictures: (SIDE, SIDE, 3) 8-bit pictures.
        prompt: Token ids up to the completion, image tokens expanded.
        completion: Token ids of the completion with its end token.
        read: The completion as the VLM reads it while it is trained: some words are replaced.
        focus: Where to look, for some tokens of the completion.
        dense: Per picture, what each image token shows; see `dense_targets`.
    """

    pictures: tuple[np.ndarray, ...]
    prompt: list[int]
    completion: list[int]
    read: list[int]
    focus: tuple[Focus, ...]
    dense: tuple[tuple[np.ndarray, np.ndarray], ...]


class ExampleWriter:
    """Turns scenes and tasks into training examples with the nano processor's tokenizer and template."""

    def __init__(self, processor: ConceptSegProcessor) -> None:
        self.processor = processor
        self.short_processor = short_processor(processor)
        self.tokenizer = processor.tokenizer
        vocabulary = self.tokenizer.get_vocab()
        self.ids = {
            name: vocabulary[name]
            for name in ("<check>", "<bbox>", "</think>", "<answer>", "</answer>", "<|im_end|>")
        }
        self._kinds = [np.asarray([vocabulary[word] for word in words]) for words in (COLORS, TEXTURES[1:])]
        self._look_words = {vocabulary[word] for word in (*COLORS, *TEXTURES[1:], *SHAPES)}

    # Perception

    def naming(
        self, rng: np.random.Generator, picture: np.ndarray, objects: Sequence[Visible]
    ) -> TrainingExample:
        """All objects of unique name in one picture, in random order: name, then box."""
        names = [item.look.phrase for item in objects]
        entries = [
            (name, {0: item.mask}, (0, item.mask))
            for item, name in zip(objects, names, strict=True)
            if names.count(name) == 1 and item.mask.sum() >= _MIN_PIXELS
        ]
        # The first word may be that of any object; only the words after it are determined.
        return self._listing(rng, "mark objects", [(picture, objects)], entries, guided_from=1)

    def finding(
        self, rng: np.random.Generator, picture: np.ndarray, objects: Sequence[Visible]
    ) -> TrainingExample:
        """Phrases that apply to one or several objects in one picture, each with the box of all they apply to."""
        entries = {}
        for item in objects:
            words = item.look.phrase.split() if item.look.kind else _some_words(rng, item.look)
            mask = np.any([other.mask for other in objects if other.look.matches(words)], axis=0)
            if mask.sum() >= _MIN_PIXELS:
                entries[" ".join(words)] = ({}, (0, mask))
        flat = [(phrase, *places) for phrase, places in entries.items()]
        return self._listing(rng, "find objects", [(picture, objects)], flat, noise=False)

    def naming_mosaic(self, rng: np.random.Generator, task: Task) -> TrainingExample:
        """The objects in a mosaic, named and located: check boxes in small cells are learned from these."""
        mosaic, shown, _ = self._mosaic(task)
        return self.naming(rng, mosaic, shown)

    def naming_marked(self, rng: np.random.Generator, task: Task) -> TrainingExample:
        """The objects that red boxes mark in a mosaic, named and located."""
        mosaic, shown, _ = self._mosaic(task)
        entries = [(item.look.phrase, {0: item.mask}, (0, item.mask)) for item in shown if item.marked]
        return self._listing(rng, "marked objects", [(mosaic, shown)], entries, guided_from=1)

    def matching(self, rng: np.random.Generator) -> TrainingExample:
        """Objects that are marked in a mosaic, found again in another scene."""
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
            shown = draw_scene(rng, cell, make_objects(rng, cell, [looks[index], *others]))
            if (box := shown.objects[0].box) is not None:
                references.setdefault(index, (shown, box))
        mosaic, objects, _ = self._picture_of(list(references.values()), role="support")
        entries = [
            (
                looks[index].phrase,
                {0: _union([o.mask for o in objects if o.marked and o.look == looks[index]]), 1: item.mask},
                (1, item.mask),
            )
            for index in references
            if (item := scene.objects[index]).mask.sum() >= _MIN_PIXELS
        ]
        pictures = [(mosaic, objects), (scene.pixels, visible_objects(scene))]
        return self._listing(rng, "same objects", pictures, entries, guided_from=1)

    def _listing(
        self,
        rng: np.random.Generator,
        instruction: str,
        pictures: Sequence[tuple[np.ndarray, Sequence[Visible]]],
        entries: Sequence[tuple[str, dict[int, np.ndarray], tuple[int, np.ndarray]]],
        guided_from: int = 0,
        noise: bool = True,
    ) -> TrainingExample:
        """Up to six phrases and boxes in random order.

        Args:
            rng: Source of chance.
            instruction: The prompt's words.
            pictures: The pictures and what they show.
            entries: Phrases; masks (by picture) where the phrase is seen; picture and mask of the box.
            guided_from: The first word of a phrase that is determined.
            noise: Replace some words where the VLM reads them.
        """
        completion: list[int] = []
        focus: list[Focus] = []
        for index in rng.permutation(len(entries))[:6]:
            phrase, seen, (picture, mask) = entries[int(index)]
            words = self._ids(phrase)
            if seen:
                tokens = {number: tokens_of(where) for number, where in seen.items()}
                focus += [Focus(len(completion) + i, tokens) for i in range(guided_from, len(words))]
            completion += words
            box = self._ids(f"<bbox>{format_box(text_box(mask_to_box(mask)), COORDINATE_SCALE)}</bbox>")
            focus += [Focus(len(completion) + i, {picture: tokens_of(mask)}) for i in (2, 4, 6, 8)]
            completion += box
        completion.append(self.ids["<|im_end|>"])
        return TrainingExample(
            tuple(picture for picture, _ in pictures),
            self._prompt(instruction, len(pictures)),
            completion,
            self._with_noise(rng, completion) if noise else completion,
            tuple(focus),
            tuple(dense_targets(objects) for _, objects in pictures),
        )

    # Tasks

    def task(
        self, rng: np.random.Generator, task: Task, chosen: int | None = None, short: bool = False
    ) -> TrainingExample:
        """A whole task: mosaic and target, the instruction, and the ground-truth completion.

        Args:
            rng: Source of chance.
            task: The task.
            chosen: Index of another object of the scene that the completion describes instead of the true one; rule
                and check stay true.
            short: Without rule and check, and without the reasoning about the references.
        """
        processor = self.short_processor if short else self.processor
        mask, answer, think = task.mask, task.answer, task.think
        if chosen is not None:
            item = task.scene.objects[chosen]
            mask = item.mask
            answer = (
                item.look.shape if len(task.answer.split()) == 1 and not item.look.kind else item.look.phrase
            )
            think = think.removesuffix(task.answer) + answer
        if short:
            think = f"it is the {answer}"
        pictures = [(task.scene.pixels, visible_objects(task.scene))]
        check, marked = None, []
        if task.references:
            mosaic, shown, frame = self._mosaic(task)
            instruction = processor.instruction(task.prompt, frame)
            pictures.insert(0, (mosaic, shown))
            check = None if short else frame.check_box
            marked = [item for item in shown if item.marked]
        else:
            instruction = processor.template.fill("no_reference", task.prompt)
        present = bool(mask.any())
        text = format_completion(
            think,
            None if short else task.rule,
            check,
            text_box(mask_to_box(mask)) if present else None,
            answer,
            COORDINATE_SCALE,
        )
        completion = [*self._ids(text), self.ids["<|im_end|>"]]
        focus: list[Focus] = []
        if check is not None:
            start = completion.index(self.ids["<check>"])
            focus += [Focus(start + i, {0: box_tokens(check)}) for i in (2, 4, 6, 8)]
        if present:
            tokens, target = tokens_of(mask), len(pictures) - 1
            start = completion.index(self.ids["<bbox>"])
            focus += [Focus(start + i, {target: tokens}) for i in (2, 4, 6, 8)]
            focus += self._word_focus(completion, think, answer, {target: tokens}, marked)
        return TrainingExample(
            tuple(picture for picture, _ in pictures),
            self._prompt(instruction, len(pictures), processor),
            completion,
            self._with_noise(rng, completion),
            tuple(focus),
            tuple(dense_targets(objects) for _, objects in pictures),
        )

    def _word_focus(
        self,
        completion: Sequence[int],
        think: str,
        answer: str,
        target: dict[int, np.ndarray],
        marked: Sequence[Visible],
    ) -> list[Focus]:
        """Where words are read: the answer's from the target, those that all marked objects answer to from them.

        The reasoning ends with the answer, and so does the completion.
        """
        focus: list[Focus] = []
        shared = {0: tokens_of(_union([item.mask for item in marked]))} if marked else {}
        # Where the marked objects look as the target does, its words can be read from either.
        twins = marked and all(item.look.matches(answer.split()) for item in marked)
        places = {**shared, **target} if twins else target
        length = len(self._ids(answer))
        for end in (completion.index(self.ids["</think>"]), completion.index(self.ids["</answer>"])):
            focus += [Focus(i, places) for i in range(end - length, end)]
        for position, word in enumerate(think.split()[:-length], start=1):
            is_look = word in COLORS or word in SHAPES or word in TEXTURES[1:]
            if marked and is_look and all(item.look.matches([word]) for item in marked):
                focus.append(Focus(position, shared))
        return focus

    # Parts

    def _mosaic(self, task: Task) -> tuple[np.ndarray, list[Visible], CoordinateFrame]:
        """The mosaic of a task's references, what it shows, and where its coordinates come from."""
        return self._picture_of(task.references)

    def _picture_of(
        self, references: Sequence[tuple[Scene, Box | None]], role: str = "auto"
    ) -> tuple[np.ndarray, list[Visible], CoordinateFrame]:
        given = [Reference(Image.fromarray(scene.pixels), box=box, role=role) for scene, box in references]
        resolved = resolve_references(given)
        frame = self.processor.make_frame((SIDE, SIDE), resolved)
        picture = compose_mosaic(resolved.images, resolved.boxes, frame.layout, resolved.proxy)
        cells = [frame.layout.cell(cell) for cell in frame.cell_of_reference]
        boxes = [None if i == resolved.proxy else box for i, (_, box) in enumerate(references)]
        return np.asarray(picture), mosaic_objects([scene for scene, _ in references], boxes, cells), frame

    def _with_noise(self, rng: np.random.Generator, completion: Sequence[int]) -> list[int]:
        """Replaces some color and texture words that other words of a look follow.

        A word of a look must be read from the picture, not guessed from the word before it: pairs that training never
        draws would else be impossible words.
        """
        read = list(completion)
        for kind in self._kinds:
            for i in np.flatnonzero(np.isin(completion[:-1], kind)):
                if completion[i + 1] in self._look_words and rng.random() < _NOISE:
                    read[i] = int(kind[int(rng.integers(len(kind)))])
        return read

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt(
        self, instruction: str, pictures: int, processor: ConceptSegProcessor | None = None
    ) -> list[int]:
        text = (processor or self.processor).chat_text(instruction, pictures)
        token = self.processor.image_token
        return self._ids(text.replace(token, token * GRID**2))


def _some_words(rng: np.random.Generator, look: Look) -> list[str]:
    """Any of a look's attributes, at least one; "object" stands where the shape is left out."""
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
) -> list[Visible]:
    """The objects of reference scenes, where the mosaic shows them; those whose boxes are drawn are marked."""
    objects: list[Visible] = []
    for scene, box, (left, top, right, bottom) in zip(scenes, boxes, cells, strict=True):
        rows = np.arange(bottom - top) * scene.pixels.shape[0] // (bottom - top)
        columns = np.arange(right - left) * scene.pixels.shape[1] // (right - left)
        for item in scene.objects:
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            mask[top:bottom, left:right] = item.mask[rows][:, columns]
            objects.append(Visible(item.look, mask, box is not None and item.box == box))
    return objects


def text_box(box: Sequence[float]) -> list[float]:
    """A box from canvas pixels to text units."""
    return [value * COORDINATE_SCALE / SIDE for value in box]


def box_tokens(box: Sequence[float]) -> np.ndarray:
    """The image tokens under a box in text units."""
    x1, y1, x2, y2 = (value * SIDE / COORDINATE_SCALE for value in box)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[round(y1) : max(round(y2), round(y1) + 1), round(x1) : max(round(x2), round(x1) + 1)] = True
    return tokens_of(mask)
