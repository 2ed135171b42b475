"""The task that a family returns, and helpers shared by several families."""

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
    """Random generator of one task.

    Args:
        seeds: Random seeds of the task.
        reference_seed: Additional seed for the references: they are redrawn while the target stays the same. If None,
            the references are drawn from the generator of the target.
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
        mask: (S, S) ground-truth mask; empty when the concept is absent.
        prompt: The user prompt.
        references: Reference scenes with the ground-truth box in each, or None for references without a box.
        think: Ground-truth reasoning; ends with the answer.
        rule: Ground-truth rule.
        answer: Noun phrase of 1 to 3 words.
        candidates: The target and the objects that could be mistaken for it, if the family asks which one is meant.
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
    """Return a reference with the box of one of its objects."""
    return scene, scene.objects[index].box


def _reference_count(rng: Rng) -> int:
    """Draw the number of references: mostly four, as in the paper's evaluation, sometimes one, two or three."""
    return int(rng.choice([4, 4, 4, 4, 3, 2, 1, 1]))


def _reference_size(size: int, count: int) -> int:
    """Return the size of references: several references are drawn at the size of a mosaic cell."""
    return size if count == 1 else size // 2


def draw_references(
    rng: Rng, size: int, draw: Callable[[Rng, int], tuple[Scene, Box | None]], count: int | None = None
) -> tuple[tuple[Scene, Box | None], ...]:
    """Draw references for a target of the given size, each at its size in the mosaic.

    All random values of the target must be drawn before its references.
    """
    count = _reference_count(rng) if count is None else count
    if isinstance(rng, TaskRng):
        rng = rng.of_references
    return tuple(draw(rng, _reference_size(size, count)) for _ in range(count))


def distractors(rng: Rng, count: int, avoid: Sequence[str]) -> list[Look]:
    """Draw looks that are not described by all of the given words."""
    looks: list[Look] = []
    while len(looks) < count:
        look = random_look(rng)
        if not look.matches(avoid):
            looks.append(look)
    return looks


def words_for(rng: Rng, look: Look) -> list[str]:
    """Draw words for a look: its shape, alone or with its color, its texture, or both."""
    choice = rng.random()
    if choice < 0.25:
        return [look.shape]
    if choice < 0.75 or look.texture == "plain":
        return [look.color, look.shape]
    return [look.texture, look.shape] if choice < 0.85 else [look.texture, look.color, look.shape]


def look_with(rng: Rng, words: Sequence[str], held_out: bool) -> Look:
    """Draw a random look that attribute words describe."""
    fixed: dict[str, str] = {}
    for word in words:
        kind = "color" if word in COLORS else "shape" if word in SHAPES else "texture"
        fixed[kind] = word
    return random_look(rng, held_out, **fixed)


def other_word(rng: Rng, words: Iterable[str], word: str) -> str:
    """Draw one of the words other than the given one."""
    return pick(rng, [other for other in words if other != word])
