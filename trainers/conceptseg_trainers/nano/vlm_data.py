"""The drawn scenes that the stages "vlm" and "base" are trained on: perception examples, then complete tasks.

Besides what `VlmStage` does, a small language model needs the following to learn from drawings:
- a curriculum from naming one object to complete tasks;
- for red boxes: the dense class "marked", and examples that name marked objects and locate them elsewhere;
- noise in the input of the VLM, so that each word of a look must be read from the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from conceptseg_hf.boxes import box_iou
from conceptseg_hf.configuration_conceptseg import ConceptSegConfig
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE

from ..from_scratch.loop import mean
from ..from_scratch.vlm_examples import TrainingExample
from ..from_scratch.vlm_stage import VlmStage, VlmWithHeads
from .dense import DENSE_CLASSES, dense_class_loss, dense_targets, shape_accuracy, visible_objects
from .examples import ExampleWriter, random_object
from .scenes import TaskMix, pretraining_scene, sheet_scene, simple_scene
from .tokenizers import build_processor

PERCEPTION_ONLY = 0.1
"""Fraction of the steps, from the first one on, that contain no tasks."""

RANDOM_CHOICE_FAMILIES = frozenset(
    "relation extreme_size extreme_kin beside ordinal distance inside_ring hidden_rule coexistence".split()
)
"""Families for which the stage "base" is trained to choose a random object.

They need abilities that no other family or perception example trains."""

_PRETRAINING_BATCH = 16
_SHORT = 0.25  # fraction of tasks without rule and check in the stage "base"
_BLOCK = 4  # number of consecutive steps with the same kind of examples
_FIRST_TASK = 200_000


class DenseHeads(nn.Module):
    """Heads that predict the classes and the box of the object of each image token; see `dense_targets`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = nn.Linear(width, sum(DENSE_CLASSES.values()))
        self.box = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))


def make_stage(
    pretraining: int,
    steps: int,
    random_choice_families: frozenset[str] = frozenset(),
    name: str = "vlm",
    device: str = "cpu",
    held_out: int = 132,
    seed: int = 0,
    preset: str = "nano",
) -> VlmStage:
    """Return the stage "vlm", or "base" with families of random choices; see `VlmStage` and `ShapesVlmData`."""
    data = ShapesVlmData(steps, 24, random_choice_families, held_out, seed)
    return _make_stage(data, pretraining, steps, name, device, seed, preset)


def make_referring_stage(
    steps: int, device: str = "cpu", held_out: int = 132, seed: int = 0, preset: str = "nano"
) -> VlmStage:
    """Return the stage "base-referring", which continues the stage "base"; see `ReferringVlmData`."""
    data = ReferringVlmData(steps, 24, RANDOM_CHOICE_FAMILIES, held_out, seed)
    return _make_stage(data, 0, steps, "base-referring", device, seed, preset)


def _make_stage(
    data: ShapesVlmData, pretraining: int, steps: int, name: str, device: str, seed: int, preset: str
) -> VlmStage:
    torch.manual_seed(seed)
    module = VlmWithHeads(ConceptSegConfig.from_preset(preset).vlm_config, DenseHeads)
    processor = data.processor.with_settings(vlm_family=module.vlm.config.model_type)
    return VlmStage(module, data, processor, pretraining, steps, name, device)


class ShapesVlmData:
    """Perception examples and tasks; see `VlmData`.

    Args:
        steps: Number of steps after the pretraining, which the curriculum is spread over.
        count: Number of task examples per step.
        random_choice_families: Families whose completions describe a random object of the scene; rule and check are
            correct. If there are any, a quarter of all tasks has no rule and check.
        held_out: Number of samples of the split "val" per evaluation.
        seed: Random seed.
    """

    open_choice = False

    def __init__(
        self,
        steps: int,
        count: int = 24,
        random_choice_families: frozenset[str] = frozenset(),
        held_out: int = 132,
        seed: int = 0,
    ) -> None:
        self.steps, self.count, self.random_choice_families = steps, count, random_choice_families
        self.held_out, self.seed = held_out, seed
        self.processor = build_processor()
        self.writer = ExampleWriter(self.processor)
        self.tasks = TaskMix()
        self._block: tuple[int, list[TrainingExample]] = (-1, [])

    def pretraining_images(self, step: int) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
        """Return the images of a step of the pretraining and their dense targets."""
        rng = np.random.default_rng([17, self.seed, step])
        scenes = [
            pretraining_scene(rng, self.tasks, step * _PRETRAINING_BATCH + i)
            for i in range(_PRETRAINING_BATCH)
        ]
        return [scene.pixels for scene in scenes], [dense_targets(visible_objects(scene)) for scene in scenes]

    def progress(self, step: int) -> float:
        """Return the completed fraction of the steps after the pretraining, at the start of the step's block."""
        return step // _BLOCK * _BLOCK / self.steps

    def examples(self, step: int) -> list[TrainingExample]:
        """Return the examples of a step after the pretraining; the fraction of complete tasks increases."""
        block, index_in_block = divmod(step, _BLOCK)
        progress = self.progress(step)
        perception = self._perception_fraction(progress)
        if self._block[0] != block:
            is_perception = np.random.default_rng([11, self.seed, block]).random() < perception
            # Perception examples are short: 50 % more of them take as long as a batch of tasks.
            count = _BLOCK * self.count * (3 if is_perception else 2) // 2
            numbers = range(block * count, (block + 1) * count)
            examples = [
                self._perception(progress, number) if is_perception else self.task_example(number)
                for number in numbers
            ]
            # Examples of similar length form a batch, which reduces padding.
            examples.sort(key=lambda example: len(example.prompt) + len(example.completion))
            self._block = (block, examples)
        size = len(self._block[1]) // _BLOCK
        return self._block[1][index_in_block * size : (index_in_block + 1) * size]

    def _perception_fraction(self, progress: float) -> float:
        """Return the fraction of the steps that contain perception examples."""
        if progress < PERCEPTION_ONLY:
            return 1.0
        return 0.5 if progress < 0.25 else 0.25 if progress < 0.85 else 0.08

    def task_example(self, number: int) -> TrainingExample:
        """Return the example of a task."""
        rng = np.random.default_rng([19, self.seed, number])
        task = self.tasks.task(_FIRST_TASK + number)
        chosen = None
        if self.tasks.family(_FIRST_TASK + number) in self.random_choice_families:
            chosen = random_object(rng, task.scene)
        short = bool(self.random_choice_families) and rng.random() < _SHORT
        return self.writer.task(rng, task, chosen, short, open_choice=chosen is not None and self.open_choice)

    def _perception(self, progress: float, number: int) -> TrainingExample:
        rng = np.random.default_rng([13, self.seed, number])
        if progress < 0.05:
            max_objects = 1 if progress < 0.02 else 2 if progress < 0.03 else 3 if progress < 0.04 else 5
            scene = simple_scene(rng, int(rng.integers(max(1, max_objects - 2), max_objects + 1)))
            return self.writer.naming(rng, scene.pixels, visible_objects(scene))
        kind = rng.random()
        if kind < 0.2:
            return self.writer.matching(rng)
        task = self.tasks.task(_FIRST_TASK + number)
        if kind < 0.35 and any(box is not None for _, box in task.references):
            return self.writer.naming_marked(rng, task)
        if kind < 0.45 and len(task.references) > 1:
            return self.writer.naming_mosaic(rng, task)
        scene = sheet_scene(rng) if kind < 0.6 else simple_scene(rng, 5) if kind < 0.75 else task.scene
        write = self.writer.finding if rng.random() < 0.5 else self.writer.naming
        return write(rng, scene.pixels, visible_objects(scene))

    def dense_loss(
        self, heads: nn.Module, targets: Sequence[tuple[np.ndarray, np.ndarray]], features: Tensor
    ) -> Tensor:
        """Compute the loss of the class and the box of each image token.

        Args:
            heads: `DenseHeads`.
            targets: Result of `dense_targets` for each image.
            features: (N * GRID * GRID, D) image tokens of the images.
        """
        heads = cast(DenseHeads, heads)
        classes, boxes = (
            torch.from_numpy(np.concatenate(part)).to(features.device) for part in zip(*targets)
        )
        is_object = classes[:, 0] > 0
        box_loss = (heads.box(features[is_object]) - boxes[is_object]).abs().mean()
        return 0.5 * dense_class_loss(heads.classes(features), classes) + 5.0 * box_loss

    def evaluate(self, stage: VlmStage) -> dict[str, float]:
        """Evaluate on the split "val".

        Metrics: accuracy of the shape, and format, box IoUs and accuracy of the answer of greedy completions.
        """
        split = ConceptShapes("val", size=SIDE)
        scenes = [split.task(i).scene for i in range(min(96, self.held_out))]
        classes = np.concatenate([dense_targets(visible_objects(scene))[0] for scene in scenes])
        features = stage.encode_images([scene.pixels for scene in scenes])
        heads = cast(DenseHeads, stage.module.dense)
        dense_metrics = {
            "shape": shape_accuracy(heads.classes(features), torch.from_numpy(classes).to(stage.device))
        }
        if stage.is_pretraining:
            return dense_metrics
        metrics: dict[str, list[float]] = {}
        further_groups = {
            name: ConceptShapes("val", size=SIDE, groups=[name]) for name in ("which one", "hidden rule")
        }
        new_looks = ConceptShapes("test-compositional", size=SIDE, groups=["diverse classes"])
        for name, source, count in (
            ("", split, self.held_out),
            *((name, source, self.held_out // 2) for name, source in further_groups.items()),
            ("new looks", new_looks, self.held_out // 3),
        ):
            for start in range(0, count, 44):
                samples = [source[i] for i in range(start, min(count, start + 44))]
                _evaluate_samples(stage, name, samples, metrics)
        return dense_metrics | {key: mean(values) for key, values in sorted(metrics.items())}


class ReferringVlmData(ShapesVlmData):
    """Further training of the stage "base": most perception examples are referring expressions.

    The VLM learns to locate what the rules of `RANDOM_CHOICE_FAMILIES` refer to, in the form of perception examples. In
    the complete tasks of these families, the words and numbers that choose an object are not trained.
    """

    open_choice = True

    def _perception_fraction(self, progress: float) -> float:
        return 0.6 if progress < 0.85 else 0.3

    def _perception(self, progress: float, number: int) -> TrainingExample:
        if self.tasks.family(_FIRST_TASK + number) not in self.random_choice_families:
            return super()._perception(1.0, number)
        rng = np.random.default_rng([31, self.seed, number])
        return self.writer.referring(rng, self.tasks.task(_FIRST_TASK + number))


def _evaluate_samples(
    stage: VlmStage, name: str, samples: list[ConceptSample], metrics: dict[str, list[float]]
) -> None:
    """Add the values of samples to the metrics of a set of samples; the name of the main set is empty."""
    prepared = [stage.processor.prepare(sample.image, sample.prompt, sample.references) for sample in samples]
    generated = generate_with_states(
        stage.module.vlm,
        stage.processor.collate(prepared, device=stage.device),
        {"max_new_tokens": 80},
        hidden_states_at="predict",
    )
    for row, (sample, item) in enumerate(zip(samples, prepared, strict=True)):
        completion = stage.processor.decode_completion(generated.token_ids[row][generated.mask[row]], item)
        check_iou = item.coordinates.check_iou(completion.check)
        if not name:
            metrics.setdefault("format", []).append(float(completion.is_valid))
            if check_iou is not None:
                metrics.setdefault("check", []).append(check_iou)
        if sample.box is None:
            continue
        ground_truth = item.coordinates.image_box_to_text(sample.box)
        iou = box_iou(completion.bbox, ground_truth) if completion.bbox else 0.0
        metrics.setdefault(f"box_{sample.stratum or name or sample.level}", []).append(iou)
        if not name:
            metrics.setdefault("answer", []).append(float(completion.answer == sample.answer))
