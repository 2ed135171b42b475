"""The tasks of photographs, compositions and drawings that the stage "ctm" is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from conceptseg_hf.data.files import FileItem
from conceptseg_hf.presets import MINI_IMAGE_SIZE as SIDE

from ..from_scratch.ctm_completions import CtmTask, TaskObject
from .dense import CHANNELS
from .tasks import FIRST_HELD_OUT, TaskSource, TrainingTask

_FIRST_TASK = 40_000_000  # above the tasks of the other stages


class PhotosCtmData:
    """Tasks; see `CtmData`.

    Args:
        root: Folder of the benchmark `photos`.
    """

    class_sizes: tuple[int, ...] = (len(CHANNELS) + 1,)

    def __init__(self, root: Path) -> None:
        self._tasks = TaskSource(root, "ctm", SIDE)
        self._validation = TaskSource(root, "val", SIDE)

    def noun(self, answer: str) -> str:
        """Return the noun of an answer; answers are nouns."""
        return answer

    def task(self, row: int) -> CtmTask:
        """Return a training task."""
        return _ctm_task(self._tasks.task(_FIRST_TASK + row))

    def held_out(self) -> dict[str, Callable[[int], CtmTask]]:
        """Return tasks of held-out photographs, dataset by dataset in turns, and of compositions."""
        items = _in_turns(self._validation.photographs.items)

        def photograph(row: int) -> CtmTask:
            item = items[row % len(items)]
            task = self._validation.photograph(np.random.default_rng([row]), item, augment=False)
            return _ctm_task(task, item.dataset)

        def composition(row: int) -> CtmTask:
            return _ctm_task(self._tasks.composition(FIRST_HELD_OUT + row), "compositions")

        return {"val": photograph, "val_compositions": composition}


def _ctm_task(task: TrainingTask, label: str = "") -> CtmTask:
    return CtmTask(
        task.pixels,
        task.mask,
        task.prompt,
        task.references,
        task.think,
        task.rule,
        task.answer,
        _classes(task.answer) if task.mask.any() else None,
        tuple(
            TaskObject(region.mask, region.nouns[0], _classes(region.nouns[0]))
            for region in task.regions
            if region.nouns
        ),
        label,
    )


def _classes(noun: str) -> tuple[int]:
    return (CHANNELS[noun] + 1 if noun in CHANNELS else 0,)


def _in_turns(items: list[FileItem]) -> list[FileItem]:
    """Return samples so that the datasets take turns."""
    position: dict[str, int] = {}
    keys = []
    for item in items:
        position[item.dataset] = position.get(item.dataset, 0) + 1
        keys.append((position[item.dataset], item.dataset))
    return [item for _, item in sorted(zip(keys, items, strict=True), key=lambda pair: pair[0])]
