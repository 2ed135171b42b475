"""Training of one arm from the base checkpoint."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.concept_translation import ConceptTranslationModule
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.progress import progress_bar
from conceptseg_hf.writing import json_text, write_file

from ...from_scratch.assemble import write_checkpoint
from ...from_scratch.vlm_examples import TrainingExample
from ...grpo_trainer import SegmentationGRPOTrainer
from ...meta_grpo_config import MetaGRPOConfig
from ...meta_grpo_trainer import MetaGRPOTrainer
from ...split_reference import split_reference_dataset
from ..scenes import TaskMix
from ..tokenizers import short_processor
from ..vlm_data import RANDOM_CHOICE_FAMILIES, ShapesVlmData, make_stage
from .arms import Arm

FIRST_TASK = 2_000_000  # above the tasks of the stages of nano
TRAINING_LOG = "training.json"
_TASKS_PER_SEED = 1_000_000
_SFT_BATCH = 24


@dataclass(frozen=True)
class TrainSettings:
    """How an arm is trained.

    Attributes:
        steps: Number of optimizer steps.
        prompts: Number of prompts per step.
        num_generations: Number of completions per prompt (G).
        num_best_and_worst: See `MetaGRPOConfig`.
        batch_size: Number of completions per forward pass.
        learning_rate: Peak learning rate.
        beta: Weight of the KL to the start.
    """

    steps: int = 60
    prompts: int = 32
    num_generations: int = 16
    num_best_and_worst: int | None = 4
    batch_size: int = 128
    learning_rate: float = 5e-4
    beta: float = 0.0

    @property
    def completions(self) -> int:
        """Number of sampled completions."""
        return self.steps * self.prompts * self.num_generations


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


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed at the end, so that an existing folder is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    temporary.rename(folder)


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


def write_log(folder: Path, seed: int, cpu_seconds: float, steps: Sequence[Mapping[str, Any]]) -> None:
    """Write "training.json": the seed, the CPU time and the metrics of each step."""
    log = {"seed": seed, "cpu_seconds": round(cpu_seconds, 1), "steps": list(steps)}
    write_file(folder / TRAINING_LOG, json_text(log) + "\n")


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


def train_by_reinforcement(
    arm: Arm,
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    samples: Sequence[ConceptSample],
    folder: Path,
    settings: TrainSettings,
    seed: int,
) -> list[dict[str, Any]]:
    """Train an arm with MetaGRPOTrainer on samples, and return the metrics of its steps."""
    args = MetaGRPOConfig(
        str(folder / "run"),
        rewards=list(arm.rewards),
        meta_without_proxy="box",
        meta_reasoning=arm.meta_reasoning,
        seg_loss_weight=arm.seg_loss_weight,
        **grpo_arguments(settings, seed),
    )
    trainer = MetaGRPOTrainer(
        model=model,
        reward_funcs=[random_reward(seed)] if arm.random_rewards else None,
        args=args,
        train_dataset=split_reference_dataset(samples, processor=processor),
        processing_class=processor,
    )
    log_history = run_trainer(trainer, f"{folder.parent.name}, seed {seed}")
    model.sam = trainer.concept_model.sam  # the trainer has removed it from the modules
    return log_history


def grpo_arguments(settings: TrainSettings, seed: int) -> dict[str, Any]:
    """Return the arguments of `SegmentationGRPOConfig` that all arms have in common."""
    completions_per_step = settings.prompts * settings.num_generations
    batch_size = min(settings.batch_size, completions_per_step)
    return {
        "num_generations": settings.num_generations,
        "num_best_and_worst": settings.num_best_and_worst,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": completions_per_step // batch_size,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "beta": settings.beta,
        "max_steps": settings.steps,
        "max_completion_length": 64,
        "freeze_vision_tower": True,
        "sam_decode_batch_size": 64,
        "seed": seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "log_examples": 0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def run_trainer(trainer: SegmentationGRPOTrainer, description: str) -> list[dict[str, Any]]:
    """Train with a progress bar, and return the metrics of the steps."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_ProgressCallback(description))
    trainer.train()
    return trainer.state.log_history


class _ProgressCallback(TrainerCallback):
    """Show a progress bar.

    Args:
        description: Description of the task.
    """

    def __init__(self, description: str) -> None:
        self.description = description

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress = progress_bar(state.max_steps, "steps", self.description)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.close()


def random_reward(seed: int) -> Callable[..., list[float]]:
    """Return a reward function whose values are uniform in [0, 1] and independent of the completion."""
    rng = np.random.default_rng(seed)

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        return rng.random(len(completions)).tolist()

    reward.__name__ = "random"
    return reward


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


def describe(settings: TrainSettings) -> str:
    """Return the settings as one line for reports."""
    return ", ".join(f"{name} {value}" for name, value in asdict(settings).items())


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
