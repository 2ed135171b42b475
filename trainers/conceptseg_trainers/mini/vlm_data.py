"""The photographs, compositions and drawings that the stage "vlm" is trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image
from torch import Tensor, nn

from conceptseg_hf.boxes import box_iou
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.presets import MINI_IMAGE_SIZE as SIDE

from ..from_scratch.loop import mean
from ..from_scratch.masks import bounding_box
from ..from_scratch.vlm_examples import TrainingExample
from ..from_scratch.vlm_stage import VlmStage
from .dense import DenseHeads, DenseTarget, dense_loss
from .examples import PhotoExampleWriter
from .photographs import Part
from .sources import SceneMix
from .tasks import FIRST_HELD_OUT, TaskSource, TrainingTask
from .tokenizers import mini_processor

_PERCEPTION = ((0.12, 1.0), (0.5, 0.75), (0.8, 0.6), (math.inf, 0.3))
"""Fractions of the steps, and the fractions of perception examples until then; the others are tasks."""
_SHEETS = 0.6  # fraction of the perception examples that show several photographs in a grid
_BLOCK = 4  # number of consecutive steps with the same kind of examples
_TASKS_PER_SEED = 1_000_000
_TEST_BATCH = 16


class PhotosVlmData:
    """Perception examples and tasks; see `VlmData`.

    Args:
        root: Folder of the benchmark `photos`.
        steps: Number of steps after the pretraining, which the curriculum is spread over.
        images: Number of images per step of the pretraining.
        count: Number of task examples per step.
        held_out: Number of tasks of the part "val" per dataset and evaluation.
        seed: Random seed.
        part: Part of the photographs.
    """

    def __init__(
        self,
        root: Path,
        steps: int,
        images: int = 16,
        count: int = 12,
        held_out: int = 8,
        seed: int = 0,
        part: Part = "vlm",
    ) -> None:
        self.steps, self.images, self.count = steps, images, count
        self.held_out, self.seed = held_out, seed
        self.writer = PhotoExampleWriter(mini_processor())
        self.scenes = SceneMix(root, SIDE, seed, part)
        self.tasks = TaskSource(root, part, SIDE)
        self.validation = TaskSource(root, "val", SIDE)
        self._block: tuple[int, list[TrainingExample]] = (-1, [])

    def pretraining_images(self, step: int) -> tuple[list[np.ndarray], list[DenseTarget]]:
        """Return the images of a step of the pretraining and their dense targets."""
        examples = [
            self.writer.finding(np.random.default_rng(0), self.scenes.scene(3, step * self.images + i))
            for i in range(self.images)
        ]
        return [e.images[0] for e in examples], [e.dense[0] for e in examples]

    def examples(self, step: int) -> Sequence[TrainingExample]:
        """Return the examples of a step after the pretraining; the fraction of complete tasks increases."""
        block, index_in_block = divmod(step, _BLOCK)
        progress = block * _BLOCK / self.steps
        perception = next(share for end, share in _PERCEPTION if progress < end)
        if self._block[0] != block:
            is_perception = np.random.default_rng([31, self.seed, block]).random() < perception
            count = _BLOCK * self.count * (3 if is_perception else 2) // 2
            numbers = range(block * count, (block + 1) * count)
            write = self._perception if is_perception else self._task
            examples = [write(number) for number in numbers]
            # Examples of similar length form a batch, which reduces padding.
            examples.sort(key=lambda example: len(example.prompt) + len(example.completion))
            self._block = (block, examples)
        size = len(self._block[1]) // _BLOCK
        return self._block[1][index_in_block * size : (index_in_block + 1) * size]

    def _task(self, number: int) -> TrainingExample:
        return self.writer.task(self._training_task(number))

    def _training_task(self, number: int) -> TrainingTask:
        return self.tasks.task(self.seed * _TASKS_PER_SEED + number)

    def _perception(self, number: int) -> TrainingExample:
        rng = np.random.default_rng([37, self.seed, number])
        kind = rng.random()
        if kind < 0.2:
            reference, scene, index = self.scenes.matching_pair(rng)
            return self.writer.matching(rng, reference, scene, index)
        if kind < 0.3:
            task = self._training_task(number)
            if any(mask is not None for mask in task.marked):
                return self.writer.naming_marked(rng, task)
        scene = self.scenes.sheet(43, number) if kind > 1 - _SHEETS else self.scenes.scene(41, number)
        write = self.writer.naming if rng.random() < 0.5 else self.writer.finding
        return write(rng, scene)

    def dense_loss(self, heads: nn.Module, targets: Sequence[DenseTarget], features: Tensor) -> Tensor:
        """Compute the loss of nouns and boxes; see `dense.dense_loss`."""
        return dense_loss(cast(DenseHeads, heads), targets, features)

    # Evaluation

    def evaluate(self, stage: VlmStage) -> dict[str, float]:
        """Evaluate tasks of photographs of the part "val", and compositions that are not trained.

        Metrics: loss of the dense targets (pretraining), or format, check, accuracy of the answer and box IoU of greedy
        completions, by dataset.
        """
        tasks = self.held_out_tasks()
        if stage.is_pretraining:
            images = [self.writer.task(task) for _, task in tasks]
            targets = [example.dense[-1] for example in images]
            features = stage.encode_images([example.images[-1] for example in images])
            return {"dense": self.dense_loss(stage.module.dense, targets, features).item()}
        metrics: dict[str, list[float]] = {}
        for start in range(0, len(tasks), _TEST_BATCH):
            _evaluate_tasks(stage, tasks[start : start + _TEST_BATCH], metrics)
        return {name: mean(values) for name, values in sorted(metrics.items())}

    def held_out_tasks(self) -> list[tuple[str, TrainingTask]]:
        """Return tasks of photographs of the part "val" and compositions that are not trained, with their datasets."""
        rng = np.random.default_rng(0)
        items: dict[str, list] = {}
        for item in self.validation.photographs.items:
            items.setdefault(item.dataset, []).append(item)
        tasks = [
            (dataset, self.validation.photograph(rng, item, augment=False))
            for dataset, group in sorted(items.items())
            for item in group[: self.held_out]
        ]
        return tasks + [
            ("compositions", self.tasks.composition(FIRST_HELD_OUT + i)) for i in range(2 * self.held_out)
        ]


def _evaluate_tasks(
    stage: VlmStage, tasks: Sequence[tuple[str, TrainingTask]], metrics: dict[str, list[float]]
) -> None:
    """Add the values of tasks to the metrics."""
    processor = stage.processor
    prepared = [
        processor.prepare(Image.fromarray(task.pixels), task.prompt, task.references) for _, task in tasks
    ]
    generated = generate_with_states(
        stage.module.vlm,
        processor.collate(prepared, device=stage.device),
        {"max_new_tokens": 80},
        hidden_states_at="predict",
    )
    for row, ((dataset, task), item) in enumerate(zip(tasks, prepared, strict=True)):
        completion = processor.decode_completion(generated.token_ids[row][generated.mask[row]], item)
        metrics.setdefault("format", []).append(float(completion.is_valid))
        check_iou = item.coordinates.check_iou(completion.check)
        if check_iou is not None:
            metrics.setdefault("check", []).append(check_iou)
        if not task.mask.any():
            continue
        ground_truth = item.coordinates.image_box_to_text(bounding_box(task.mask))
        iou = box_iou(completion.bbox, ground_truth) if completion.bbox else 0.0
        metrics.setdefault(f"box_{dataset}", []).append(iou)
        metrics.setdefault("answer", []).append(float(completion.answer == task.answer))
