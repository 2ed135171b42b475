"""CI: the concept is visible in the object itself. Diverse classes, including absent ones."""

from __future__ import annotations

import numpy as np

from ..scenes import (
    Box,
    Scene,
    draw_scene,
    make_objects,
    random_look,
)
from .task import Rng, Task, distractors, draw_references, look_with, shows, words_for


def attribute(rng: Rng, size: int, held_out: bool) -> Task:
    """All objects with a given shape, color or texture; one in five scenes has two of them."""
    look = random_look(rng, held_out)
    words = words_for(rng, look)
    looks = [look]
    if rng.random() < 0.2:
        looks.append(look)
    looks += distractors(rng, int(rng.integers(1, 5 - len(looks) + 1)), words)
    scene = draw_scene(rng, size, make_objects(rng, size, looks))

    def reference(rng: Rng, size: int) -> tuple[Scene, Box | None]:
        twin = look_with(rng, words, held_out and len(words) > 1)
        objects = make_objects(rng, size, [twin, *distractors(rng, int(rng.integers(0, 3)), words)])
        return shows(draw_scene(rng, size, objects))

    phrase = " ".join(words)
    references = draw_references(rng, size, reference) if rng.random() < 0.5 else ()
    return Task(
        scene,
        scene.mask_of(words),
        phrase,
        references,
        f"the user asks for the {phrase}",
        f"find the {phrase}",
        phrase,
    )


def absent(rng: Rng, size: int, held_out: bool) -> Task:
    """A phrase that describes no object of the scene; in half of the samples one of its words does."""
    objects = make_objects(rng, size, [random_look(rng) for _ in range(int(rng.integers(2, 5)))])
    scene = draw_scene(rng, size, objects)
    hard = rng.random() < 0.5
    while True:
        look = random_look(rng, held_out)
        words = words_for(rng, look)
        near = any(
            set(words) & {item.look.shape, item.look.color, item.look.texture} for item in scene.objects
        )
        if (
            near == hard
            and (not hard or len(words) > 1)
            and not any(item.look.matches(words) for item in scene.objects)
        ):
            break
    phrase = " ".join(words)
    return Task(
        scene,
        np.zeros((size, size), dtype=bool),
        phrase,
        (),
        f"there is no {phrase}",
        f"find the {phrase}",
        phrase,
    )
