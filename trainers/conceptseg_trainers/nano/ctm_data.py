"""The drawn tasks that the stage "ctm" is trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.references import Reference

from ..from_scratch.ctm_completions import CtmTask, TaskObject
from .dense import DENSE_CLASSES, look_classes
from .examples import answer_for
from .scenes import TaskMix

_FIRST_TASK = 900_000  # above the tasks of the other stages


class ShapesCtmData:
    """Tasks of ConceptShapes; see `CtmData`."""

    class_sizes = tuple(DENSE_CLASSES.values())

    def __init__(self) -> None:
        self._mix = TaskMix()

    def noun(self, answer: str) -> str:
        """Return the noun of an answer, its last word."""
        return answer.split()[-1]

    def task(self, row: int) -> CtmTask:
        """Return a task of the split "train"."""
        return _task(*self._mix.locate(_FIRST_TASK + row))

    def held_out(self) -> dict[str, Callable[[int], CtmTask]]:
        """Return the tasks of the split "val", and of its group "which one"."""
        val = ConceptShapes("val", size=SIDE)
        which_one = ConceptShapes("val", size=SIDE, groups=["which one"])
        return {"val": lambda row: _task(val, row), "val_which_one": lambda row: _task(which_one, row)}


def _task(benchmark: ConceptShapes, index: int) -> CtmTask:
    task, slot = benchmark.task(index), benchmark.slot(index)
    target = next((item for item in task.scene.objects if np.array_equal(item.mask, task.mask)), None)
    return CtmTask(
        task.scene.pixels,
        task.mask,
        task.prompt,
        tuple(Reference(Image.fromarray(scene.pixels), box=box) for scene, box in task.references),
        task.think,
        task.rule,
        task.answer,
        None if target is None else look_classes(target.look),
        tuple(
            TaskObject(item.mask, answer_for(task, item.look), look_classes(item.look))
            for item in task.scene.objects
        ),
        slot.stratum or slot.level,
    )
