"""What a family returns, and what several families need to make it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...sample import Candidate
from ..rendering import COLORS, SHAPES, BoolArray
from ..scenes import (
    Box,
    Look,
    Scene,
    pick,
    random_look,
)

Rng = np.random.Generator


class TaskRng(np.random.Generator):
    """The source of chance of one task.

    Args:
        seeds: Numbers from which the task is drawn.
        reference_seed: Another seed of its references: the target stays as it is, references are drawn anew. None: the
            same source goes on.
    """

    def __init__(self, seeds: Sequence[int], reference_seed: int | None = None) -> None:
        super().__init__(np.random.PCG64(list(seeds)))
        self.of_references: Rng = self
        if reference_seed is not None:
            self.of_references = np.random.default_rng([*seeds, reference_seed])


@dataclass(frozen=True)
class Task:
    """One task before it becomes a `ConceptSample`.

    Attributes:
        scene: The target scene.
        mask: (S, S) true mask; empty when the concept is absent.
        prompt: The user's words.
        references: Reference scenes with the true box in each, or None where a reference carries no box.
        think: Ground-truth reasoning; ends with the answer.
        rule: Ground-truth rule.
        answer: Noun phrase of 1 to 3 words.
        candidates: The target and the objects that could be taken for it, where the family asks which one is meant.
    """

    scene: Scene
    mask: BoolArray
    prompt: str
    references: tuple[tuple[Scene, Box | None], ...]
    think: str
    rule: str
    answer: str
    candidates: tuple[Candidate, ...] = ()


def shows(scene: Scene, index: int = 0) -> tuple[Scene, Box | None]:
    """A reference whose box is that of one of its objects."""
    return scene, scene.objects[index].box


def _reference_count(rng: Rng) -> int:
    """Mostly four references, as the paper's evaluation; sometimes one, two or three."""
    return int(rng.choice([4, 4, 4, 4, 3, 2, 1, 1]))


def _reference_size(size: int, count: int) -> int:
    """References of a mosaic are drawn at the size of a mosaic cell."""
    return size if count == 1 else size // 2


def draw_references(
    rng: Rng, size: int, draw: Callable[[Rng, int], tuple[Scene, Box | None]], count: int | None = None
) -> tuple[tuple[Scene, Box | None], ...]:
    """Draws references for a target of the given size, each at the size it will have in the mosaic.

    All that is random in a target is drawn before its references.
    """
    count = _reference_count(rng) if count is None else count
    if isinstance(rng, TaskRng):
        rng = rng.of_references
    return tuple(draw(rng, _reference_size(size, count)) for _ in range(count))


def distractors(rng: Rng, count: int, avoid: Sequence[str]) -> list[Look]:
    """Looks that do not answer to all the given words."""
    looks: list[Look] = []
    while len(looks) < count:
        look = random_look(rng)
        if not look.matches(avoid):
            looks.append(look)
    return looks


def words_for(rng: Rng, look: Look) -> list[str]:
    """Words for a look: its shape, with its color, its texture, or both."""
    choice = rng.random()
    if choice < 0.25:
        return [look.shape]
    if choice < 0.75 or look.texture == "plain":
        return [look.color, look.shape]
    return [look.texture, look.shape] if choice < 0.85 else [look.texture, look.color, look.shape]


def look_with(rng: Rng, words: Sequence[str], held_out: bool) -> Look:
    """A random look that answers to attribute words."""
    fixed: dict[str, str] = {}
    for word in words:
        kind = "color" if word in COLORS else "shape" if word in SHAPES else "texture"
        fixed[kind] = word
    return random_look(rng, held_out, **fixed)


def other_word(rng: Rng, words: Iterable[str], word: str) -> str:
    """One of the words, but not this one."""
    return pick(rng, [other for other in words if other != word])
