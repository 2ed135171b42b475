"""What the nano VLM is taught: pictures, a text to continue, and where it should look while it writes.

Two kinds of lesson: `naming_lesson` lists the things in one picture with their boxes, many box targets for
little text; `task_lesson` is a whole task as the model will meet it, with mosaic, instruction and
completion. The pictures and prompts of a task lesson are exactly those of `ConceptSegProcessor` (tested);
they are made here without its general machinery, which would cost more than a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor, nn

from conceptseg_hf.boxes import mask_to_box
from conceptseg_hf.completion import format_box, format_completion
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.families.task import Task, words_for
from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES, turns_of
from conceptseg_hf.data.concept_shapes.scenes import (
    Look,
    Scene,
    SceneObject,
    draw_scene,
    make_objects,
    random_look,
)
from conceptseg_hf.mosaic import compose_mosaic
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.processing_conceptseg import ConceptSegProcessor, CoordinateFrame
from conceptseg_hf.references import Reference, resolve_references

from .tokenizers import COORDINATE_SCALE

GRID = 8  # image tokens per side
KINDS = ("", "glass", "shadow", "hidden", "core", "scratch", "stain", "hole", "lesion")
DENSE_CLASSES = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 2,
    "texture": len(TEXTURES) + 1,
    "kind": len(KINDS) + 1,
}
_LEAST_AREA = 0.12  # share of an image token that a thing must cover to be what the token shows


@dataclass(frozen=True)
class Visible:
    """One thing in a picture: its look and its visible pixels (SIDE, SIDE)."""

    look: Look
    mask: np.ndarray


@dataclass(frozen=True)
class Focus:
    """While the token at a place of the completion is being chosen, attention belongs on these image tokens.

    Attributes:
        position: Index of the token within the completion.
        picture: Index of the picture.
        tokens: (GRID * GRID,) bool.
    """

    position: int
    picture: int
    tokens: np.ndarray


@dataclass(frozen=True)
class Lesson:
    """One training sequence.

    Attributes:
        pictures: (SIDE, SIDE, 3) 8-bit pictures.
        prompt: Token ids up to the completion, image tokens expanded.
        completion: Token ids of the completion with its end token.
        focus: Where to look, for some tokens of the completion.
        dense: Per picture, what each image token shows: (GRID * GRID, 4) classes (0: nothing) and (GRID *
            GRID, 4) boxes in 0..1.
    """

    pictures: tuple[np.ndarray, ...]
    prompt: list[int]
    completion: list[int]
    focus: tuple[Focus, ...]
    dense: tuple[tuple[np.ndarray, np.ndarray], ...]


def visible_things(scene: Scene) -> list[Visible]:
    """The things of a scene, as its picture shows them."""
    return [Visible(item.look, item.mask) for item in scene.objects]


class LessonWriter:
    """Turns scenes and tasks into lessons with the nano processor's tokenizer and template."""

    def __init__(self, processor: ConceptSegProcessor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        vocabulary = self.tokenizer.get_vocab()
        self.ids = {
            name: vocabulary[name]
            for name in ("<check>", "<bbox>", "</think>", "<answer>", "</answer>", "<|im_end|>", "[")
        }

    def naming_lesson(
        self, rng: np.random.Generator, picture: np.ndarray, things: Sequence[Visible]
    ) -> Lesson:
        """All things of unique name in one picture, in random order: name, then box."""
        names = [thing.look.phrase for thing in things]
        unique = [
            thing
            for thing, name in zip(things, names, strict=True)
            if names.count(name) == 1 and thing.mask.sum() >= 12
        ]
        entries = [(thing.look.phrase, thing.mask) for thing in unique]
        # While it names a thing it may choose which; only the words after the first are determined.
        return self._listing(rng, "mark objects", picture, things, entries, words_seen_from=1)

    def finding_lesson(
        self, rng: np.random.Generator, picture: np.ndarray, things: Sequence[Visible]
    ) -> Lesson:
        """Phrases that apply to one or several things in one picture, each with the box of all they apply to."""
        entries = {}
        for thing in things:
            words = thing.look.phrase.split() if thing.look.kind else words_for(rng, thing.look)
            mask = np.any([other.mask for other in things if other.look.matches(words)], axis=0)
            if mask.sum() >= 12:
                entries[" ".join(words)] = mask
        return self._listing(rng, "find objects", picture, things, list(entries.items()))

    def _listing(
        self,
        rng: np.random.Generator,
        instruction: str,
        picture: np.ndarray,
        things: Sequence[Visible],
        entries: Sequence[tuple[str, np.ndarray]],
        words_seen_from: int | None = None,
    ) -> Lesson:
        """Up to six phrases and boxes in random order; the words of a phrase from a certain one on are to be seen."""
        completion: list[int] = []
        focus: list[Focus] = []
        for index in rng.permutation(len(entries))[:6]:
            phrase, mask = entries[int(index)]
            tokens, words = tokens_of(mask), self._ids(phrase)
            if words_seen_from is not None:
                focus += [Focus(len(completion) + i, 0, tokens) for i in range(words_seen_from, len(words))]
            completion += words
            box = self._ids(f"<bbox>{format_box(text_box(mask_to_box(mask)), COORDINATE_SCALE)}</bbox>")
            focus += [Focus(len(completion) + i, 0, tokens) for i in (2, 4, 6, 8)]
            completion += box
        return Lesson(
            (picture,),
            self._prompt(instruction, 1),
            [*completion, self.ids["<|im_end|>"]],
            tuple(focus),
            (dense_targets(things),),
        )

    def task_lesson(self, task: Task) -> Lesson:
        """A whole task: mosaic and target, the instruction, and the ground-truth completion."""
        things = visible_things(task.scene)
        pictures, dense, check, check_tokens = [task.scene.pixels], [dense_targets(things)], None, None
        if task.references:
            mosaic, shown, frame = self._mosaic(task)
            instruction = self.processor.instruction(task.prompt, frame)
            pictures.insert(0, mosaic)
            dense.insert(0, dense_targets(shown))
            check = frame.check_box
            if check is not None:
                check_tokens = box_tokens(check)
        else:
            instruction = self.processor.template.fill("no_reference", task.prompt)
        present = bool(task.mask.any())
        text = format_completion(
            task.think,
            task.rule,
            check,
            text_box(mask_to_box(task.mask)) if present else None,
            task.answer,
            COORDINATE_SCALE,
        )
        completion = [*self._ids(text), self.ids["<|im_end|>"]]
        focus: list[Focus] = []
        if check_tokens is not None:
            start = completion.index(self.ids["<check>"])
            focus += [Focus(start + i, 0, check_tokens) for i in (2, 4, 6, 8)]
        if present:
            tokens, target = tokens_of(task.mask), len(pictures) - 1
            start = completion.index(self.ids["<bbox>"])
            focus += [Focus(start + i, target, tokens) for i in (2, 4, 6, 8)]
            # The reasoning ends with the answer, and so does the completion.
            length = completion.index(self.ids["</answer>"]) - completion.index(self.ids["<answer>"]) - 1
            for end in (completion.index(self.ids["</think>"]), completion.index(self.ids["</answer>"])):
                focus += [Focus(i, target, tokens) for i in range(end - length, end)]
        return Lesson(
            tuple(pictures), self._prompt(instruction, len(pictures)), completion, tuple(focus), tuple(dense)
        )

    def mosaic_naming_lesson(self, rng: np.random.Generator, task: Task) -> Lesson:
        """The things in a mosaic, named and located: so that check boxes in small cells are learned."""
        mosaic, shown, _ = self._mosaic(task)
        return self.naming_lesson(rng, mosaic, shown)

    def _mosaic(self, task: Task) -> tuple[np.ndarray, list[Visible], CoordinateFrame]:
        """The mosaic of a task's references, what it shows, and where its coordinates come from."""
        references = [Reference(Image.fromarray(scene.pixels), box=box) for scene, box in task.references]
        resolved = resolve_references(references)
        frame = self.processor.make_frame((SIDE, SIDE), resolved)
        picture = compose_mosaic(resolved.images, resolved.boxes, frame.layout, resolved.proxy)
        rects = [frame.layout.cell(cell) for cell in frame.cell_of_reference]
        return np.asarray(picture), mosaic_things([scene for scene, _ in task.references], rects), frame

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt(self, instruction: str, pictures: int) -> list[int]:
        text = self.processor.chat_text(instruction, pictures)
        token = self.processor.image_token
        return self._ids(text.replace(token, token * GRID**2))


def simple_scene(rng: np.random.Generator, count: int) -> Scene:
    """A scene of some objects, for the first lessons."""
    return draw_scene(rng, SIDE, make_objects(rng, SIDE, [random_look(rng) for _ in range(count)]))


def sheet_scene(rng: np.random.Generator) -> Scene:
    """A sheet of 4 to 16 large objects in rows, each filling most of its cell: many shapes in one picture."""
    rows = int(rng.integers(2, 5))
    cell = SIDE / rows
    objects = []
    for place in range(rows * rows):
        radius = cell * (0.25 + 0.225 * rng.random())
        slack = cell / 2 - 0.95 * radius
        centre = [(i + 0.5) * cell + slack * (2 * rng.random() - 1) for i in divmod(place, rows)]
        look = random_look(rng)
        turns = turns_of(look.shape)
        objects.append(SceneObject(look, *centre, radius, turns[int(rng.integers(len(turns)))]))
    return draw_scene(rng, SIDE, objects)


def sight_scene(rng: np.random.Generator, tasks: ConceptShapes, index: int) -> Scene:
    """A picture to learn seeing on, before any words: mostly sheets."""
    return sheet_scene(rng) if rng.random() < 0.8 else tasks.task(index).scene


def dense_class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of what each place shows; places that show something count as much as all together.

    Args:
        logits: (N, sum of `DENSE_CLASSES`).
        classes: (N, 4), as `dense_targets` gives them.
    """
    loss = logits.new_zeros(())
    something = classes[:, 0] > 0
    for i, part in enumerate(logits.split(list(DENSE_CLASSES.values()), dim=1)):
        each = nn.functional.cross_entropy(part, classes[:, i], reduction="none")
        loss = loss + 0.25 * each.mean() + each[something].sum() / something.sum().clamp(min=1)
    return loss


def shape_accuracy(logits: Tensor, classes: Tensor) -> float:
    """Share of the places showing something at which the shape is right; arguments as in `dense_class_loss`."""
    something = classes[:, 0] > 0
    shapes = logits[something, : DENSE_CLASSES["shape"]].argmax(1)
    return float((shapes == classes[something, 0]).float().mean())


def mosaic_things(scenes: Sequence[Scene], rects: Sequence[tuple[int, int, int, int]]) -> list[Visible]:
    """The things of reference scenes, where the mosaic shows them."""
    things: list[Visible] = []
    for scene, (left, top, right, bottom) in zip(scenes, rects, strict=True):
        rows = np.arange(bottom - top) * scene.pixels.shape[0] // (bottom - top)
        columns = np.arange(right - left) * scene.pixels.shape[1] // (right - left)
        for item in scene.objects:
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            mask[top:bottom, left:right] = item.mask[rows][:, columns]
            things.append(Visible(item.look, mask))
    return things


def text_box(box: Sequence[float]) -> list[float]:
    """A box from canvas pixels to text units."""
    return [value * COORDINATE_SCALE / SIDE for value in box]


def _token_areas(mask: np.ndarray) -> np.ndarray:
    """Share of each image token that a mask covers, (GRID * GRID,)."""
    side = SIDE // GRID
    return mask.reshape(GRID, side, GRID, side).mean(axis=(1, 3)).reshape(-1)


def tokens_of(mask: np.ndarray) -> np.ndarray:
    """The image tokens that show a mask: covered by a quarter, or by half as much as the best covered one."""
    areas = _token_areas(mask)
    return areas >= min(0.25, 0.5 * areas.max())


def box_tokens(box: Sequence[float]) -> np.ndarray:
    """The image tokens under a box in text units."""
    x1, y1, x2, y2 = (value * SIDE / COORDINATE_SCALE for value in box)
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[round(y1) : max(round(y2), round(y1) + 1), round(x1) : max(round(x2), round(x1) + 1)] = True
    return tokens_of(mask)


def token_things(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Which of some things, given by masks (SIDE, SIDE), each image token shows most of; -1 where it shows none."""
    areas = np.stack([np.full(GRID * GRID, _LEAST_AREA), *(_token_areas(mask) for mask in masks)])
    return areas.argmax(0) - 1


def dense_targets(things: Sequence[Visible]) -> tuple[np.ndarray, np.ndarray]:
    """What each image token shows: classes (GRID * GRID, 4), 0 for nothing, and its box in 0..1."""
    shown = token_things([thing.mask for thing in things])
    nothing = ((0,) * len(DENSE_CLASSES), (0.0,) * 4)
    table = [
        (look_classes(t.look), np.asarray(mask_to_box(t.mask)) / SIDE) if t.mask.any() else nothing
        for t in things
    ]
    classes, boxes = zip(*table, nothing)
    return np.asarray(classes, dtype=np.int64)[shown], np.asarray(boxes, dtype=np.float32)[shown]


def look_classes(look: Look) -> tuple[int, int, int, int]:
    """Class indices of a look, in the order of `DENSE_CLASSES`; 0 is left for nothing."""
    return (
        SHAPES.index(look.shape) + 1,
        (*COLORS, GREY).index(look.color) + 1,
        TEXTURES.index(look.texture) + 1,
        KINDS.index(look.kind) + 1,
    )
