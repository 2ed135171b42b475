"""Scenes and tasks that the nano stages train on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.data.concept_shapes.families import Task
from conceptseg_hf.data.concept_shapes.rendering import GREY, turns_of
from conceptseg_hf.data.concept_shapes.scenes import (
    Scene,
    SceneObject,
    draw_scene,
    make_objects,
    random_look,
)
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE

# Of eight tasks, five are of Table 1's groups, two ask "which one", one has a hidden rule.
_MIX = ("table", "which one", "table", "table", "hidden rule", "table", "which one", "table")


class TaskMix:
    """Tasks of all groups of the split "train", a function of their number alone."""

    def __init__(self) -> None:
        self._sources = {
            "table": ConceptShapes("train", size=SIDE),
            **{
                name: ConceptShapes("train", size=SIDE, groups=[name])
                for name in ("which one", "hidden rule")
            },
        }

    def place(self, number: int) -> tuple[ConceptShapes, int]:
        """The source of a task and its index there."""
        round_number, slot = divmod(number, len(_MIX))
        name = _MIX[slot]
        earlier = _MIX[:slot].count(name)
        return self._sources[name], round_number * _MIX.count(name) + earlier

    def task(self, number: int) -> Task:
        """A task."""
        source, index = self.place(number)
        return source.task(index)

    def family(self, number: int) -> str:
        """The family of a task."""
        source, index = self.place(number)
        return source.slot(index).family.__name__


def simple_scene(rng: np.random.Generator, count: int) -> Scene:
    """A scene of some objects, for the first examples."""
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
        if rng.random() < 0.15:  # a shape without a color word: shapes are learned apart from colors
            look = replace(look, color=GREY)
        turns = turns_of(look.shape)
        objects.append(SceneObject(look, *centre, radius, turns[int(rng.integers(len(turns)))]))
    return draw_scene(rng, SIDE, objects)


def pretraining_scene(rng: np.random.Generator, tasks: TaskMix, number: int) -> Scene:
    """A picture to learn seeing on, before any words: mostly sheets."""
    return sheet_scene(rng) if rng.random() < 0.8 else tasks.task(number).scene
