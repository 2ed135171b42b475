"""Scenes and tasks that the nano stages are trained on."""

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

# Of eight tasks, five are from the groups of Table 1, two from "which one" and one from "hidden rule".
_MIX = ("table", "which one", "table", "table", "hidden rule", "table", "which one", "table")
_LENGTH = 100_000_000  # `evidence` needs more tasks than the default length of the split


class TaskMix:
    """Tasks of all groups of the split "train", numbered from 0; a task depends only on its number."""

    def __init__(self) -> None:
        self._sources = {
            "table": ConceptShapes("train", length=_LENGTH, size=SIDE),
            **{
                name: ConceptShapes("train", length=_LENGTH, size=SIDE, groups=[name])
                for name in ("which one", "hidden rule")
            },
        }

    def locate(self, number: int) -> tuple[ConceptShapes, int]:
        """Return the benchmark that contains a task, and the index of the task in it."""
        round_number, slot = divmod(number, len(_MIX))
        name = _MIX[slot]
        earlier = _MIX[:slot].count(name)
        return self._sources[name], round_number * _MIX.count(name) + earlier

    def task(self, number: int) -> Task:
        """Return a task."""
        source, index = self.locate(number)
        return source.task(index)

    def family(self, number: int) -> str:
        """Return the name of a task's family."""
        source, index = self.locate(number)
        return source.slot(index).family.__name__


def simple_scene(rng: np.random.Generator, count: int) -> Scene:
    """Draw a scene of `count` objects, for the first examples."""
    return draw_scene(rng, SIDE, make_objects(rng, SIDE, [random_look(rng) for _ in range(count)]))


def sheet_scene(rng: np.random.Generator) -> Scene:
    """Draw a sheet of 4, 9 or 16 large objects in rows, which shows many shapes in one image."""
    rows = int(rng.integers(2, 5))
    cell = SIDE / rows
    objects = []
    for index in range(rows * rows):
        radius = cell * (0.25 + 0.225 * rng.random())
        slack = cell / 2 - 0.95 * radius
        cx, cy = ((i + 0.5) * cell + slack * (2 * rng.random() - 1) for i in divmod(index, rows))
        look = random_look(rng)
        if rng.random() < 0.15:  # without a color word, so that shapes are learned independently of colors
            look = replace(look, color=GREY)
        turns = turns_of(look.shape)
        objects.append(SceneObject(look, cx, cy, radius, turns[int(rng.integers(len(turns)))]))
    return draw_scene(rng, SIDE, objects)


def pretraining_scene(rng: np.random.Generator, tasks: TaskMix, number: int) -> Scene:
    """Draw a scene for the pretraining of a vision tower: a sheet (80 %), or the scene of a task."""
    return sheet_scene(rng) if rng.random() < 0.8 else tasks.task(number).scene
