"""Training of one arm from the base checkpoint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.concept_translation import ConceptTranslationModule
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.progress import progress_bar

from ...experiments.arms import Arm
from ...experiments.reinforcement import train_by_reinforcement
from ...experiments.run_folder import complete_folder, write_log
from ...experiments.settings import TrainSettings
from ...from_scratch.assemble import write_checkpoint
from ...from_scratch.vlm_examples import TrainingExample
from ..scenes import TaskMix
from ..tokenizers import short_processor
from ..vlm_data import RANDOM_CHOICE_FAMILIES, ShapesVlmData, make_stage

FIRST_TASK = 2_000_000  # above the tasks of the stages of nano
_TASKS_PER_SEED = 1_000_000
_SFT_BATCH = 24


def train_arm(arm: Arm, start: Path, folder: Path, settings: TrainSettings, seed: int) -> Path:
    """Train an arm and write its checkpoint; does nothing if the checkpoint exists.

    An interrupted training starts from scratch.

    Args:
        arm: The arm.
        start: Folder of the base checkpoint.
        folder: Folder of the run; the checkpoint is written to its subfolder "checkpoint".
        settings: How the arm is trained.
        seed: Random seed of data and sampling.

    Returns:
        The folder of the checkpoint. The file "training.json" beside it contains the seed, the CPU time in seconds and
        the metrics of each step.
    """
    checkpoint = folder / "checkpoint"
    if checkpoint.is_dir():
        return checkpoint
    with complete_folder(checkpoint) as temporary:
        _write_arm(arm, start, folder, settings, seed, temporary)
    return checkpoint


def _write_arm(
    arm: Arm, start: Path, folder: Path, settings: TrainSettings, seed: int, checkpoint: Path
) -> None:
    """Train an arm and write its checkpoint and its log."""
    start_time = time.process_time()
    model = ConceptSegForSegmentation.from_pretrained(start)
    processor = ConceptSegProcessor.from_pretrained(start)
    if not arm.meta_reasoning:
        processor = short_processor(processor)
    torch.manual_seed(seed)
    if arm.new_ctm:
        # `_init_weights` does not change loaded weights, so the module is replaced.
        model.ctm = ConceptTranslationModule(model.config.ctm_config)
        model.ctm.apply(model._init_weights)
    steps: list[dict[str, Any]] = []
    if arm.supervised:
        _train_supervised(model, settings, seed)
    else:
        samples = training_samples(settings.steps * settings.prompts, seed)
        steps = train_by_reinforcement(arm, model, processor, samples, folder, settings, seed)
    write_log(folder, seed, time.process_time() - start_time, steps)
    write_checkpoint(model, processor, checkpoint)


def _task_numbers(seed: int) -> Iterator[int]:
    """Yield the numbers of the tasks that are used with a seed, of each of `RANDOM_CHOICE_FAMILIES` in turn."""
    mix = TaskMix()
    first = FIRST_TASK + _TASKS_PER_SEED * seed
    numbers_by_family: dict[str, deque[int]] = {family: deque() for family in sorted(RANDOM_CHOICE_FAMILIES)}
    remaining = iter(range(first, first + _TASKS_PER_SEED))
    for family in cycle(numbers_by_family):
        while not numbers_by_family[family]:
            number = next(remaining)
            numbers_by_family.get(mix.family(number), deque()).append(number)
        yield numbers_by_family[family].popleft()


def training_samples(count: int, seed: int) -> list[ConceptSample]:
    """Return training samples of `RANDOM_CHOICE_FAMILIES`."""
    mix = TaskMix()
    locations = (mix.locate(number) for number in _task_numbers(seed))
    return [source[index] for _, (source, index) in zip(range(count), locations)]


def _train_supervised(model: ConceptSegForSegmentation, settings: TrainSettings, seed: int) -> None:
    """Train the VLM on ground-truth completions.

    The number of examples is the number of completions that the other arms are trained on, but each is a new task. The
    first tasks are those of the other arms. SAM 3, the CTM and the vision tower are not trained.
    """
    count = settings.num_best_and_worst
    num_examples = settings.completions if count is None else settings.steps * settings.prompts * 2 * count
    steps = max(1, num_examples // _SFT_BATCH)
    stage = make_stage(1, steps, held_out=1, seed=seed)
    writer = cast(ShapesVlmData, stage.data).writer
    stage.module.vlm = model.vlm
    for name, parameter in stage.module.named_parameters():
        # The dense heads of the new stage are not used.
        parameter.requires_grad_(name.startswith("vlm.") and "visual" not in name)
    parameters = [parameter for parameter in model.vlm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99))
    mix, numbers = TaskMix(), _task_numbers(seed)
    model.vlm.train()
    progress = progress_bar(steps, "steps", f"sft, seed {seed}")
    for step in range(steps):
        examples: list[TrainingExample] = []
        for _, number in zip(range(_SFT_BATCH), numbers):
            rng = np.random.default_rng([23, seed, number])
            examples.append(writer.task(rng, mix.task(number)))
        loss, _ = stage.example_loss(examples)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 10)
        optimizer.step()
        progress.update()
    progress.close()
    model.vlm.eval()


def evaluation_samples(count: int) -> dict[str, list[ConceptSample]]:
    """Return the held-out samples of each evaluation set: trained families, held-out rules, and compositional looks.

    Raises:
        ValueError: If a set has fewer samples.
    """
    sources = {
        "trained families": [
            ConceptShapes("test", size=SIDE),
            *_groups("test", ("which one", "hidden rule")),
        ],
        "held-out rules": _groups("test-rules", ("hidden rule",)),
        "compositional looks": [
            ConceptShapes("test-compositional", size=SIDE),
            *_groups("test-compositional", ("which one", "hidden rule")),
        ],
    }
    samples = {name: _first_samples(benchmarks, count) for name, benchmarks in sources.items()}
    for name, set_samples in samples.items():
        if len(set_samples) < count:
            raise ValueError(
                f"the evaluation set {name!r} has {len(set_samples)} samples, fewer than {count}; use fewer samples."
            )
    return samples


def _groups(split: str, names: Sequence[str]) -> list[ConceptShapes]:
    return [ConceptShapes(split, size=SIDE, groups=[name]) for name in names]


def _first_samples(benchmarks: Sequence[ConceptShapes], count: int) -> list[ConceptSample]:
    """Return up to `count` samples, taken from the benchmarks in turn until these are exhausted."""
    iterators = [_usable_samples(benchmark) for benchmark in benchmarks]
    samples: list[ConceptSample] = []
    while iterators and len(samples) < count:
        for iterator in list(iterators):
            sample = next(iterator, None)
            if sample is None:
                iterators.remove(iterator)
            else:
                samples.append(sample)
    return samples[:count]


def _usable_samples(benchmark: ConceptShapes) -> Iterator[ConceptSample]:
    """Yield the samples of `RANDOM_CHOICE_FAMILIES` whose concept is present."""
    for index in range(len(benchmark)):
        if benchmark.slot(index).family.__name__ in RANDOM_CHOICE_FAMILIES:
            sample = benchmark[index]
            if sample.present:
                yield sample
