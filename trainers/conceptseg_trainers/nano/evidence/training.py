"""Trains one arm from a start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.data import ConceptSample, ConceptShapes
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE
from conceptseg_hf.progress import progress_bar

from ...meta_grpo_config import MetaGRPOConfig
from ...meta_grpo_trainer import MetaGRPOTrainer
from ...split_reference import split_reference_dataset
from ..assemble import write_checkpoint
from ..scenes import TaskMix
from ..tokenizers import short_processor
from ..vlm_stage import UNTAUGHT_FAMILIES, VlmStage
from .arms import Arm

logger = logging.getLogger(__name__)

FIRST_TASK = 2_000_000  # no task below is used for reinforcement learning; the stages of nano stay below
_SFT_BATCH = 24


@dataclass(frozen=True)
class TrainSettings:
    """How an arm is trained.

    Attributes:
        steps: Optimizer steps.
        prompts: Prompts per step.
        num_generations: Completions per prompt (G).
        num_best_and_worst: Number of completions with the highest and with the lowest advantage that are trained on.
        batch_size: Completions per forward pass.
        learning_rate: Peak learning rate.
        beta: Weight of the KL to the start.
    """

    steps: int = 30
    prompts: int = 16
    num_generations: int = 32
    num_best_and_worst: int | None = 4
    batch_size: int = 128
    learning_rate: float = 3e-4
    beta: float = 0.0

    @property
    def completions(self) -> int:
        """Number of sampled completions."""
        return self.steps * self.prompts * self.num_generations


def train_arm(arm: Arm, start: Path, folder: Path, settings: TrainSettings, seed: int) -> Path:
    """Trains an arm, or resumes its training, and writes its checkpoint.

    Args:
        arm: The arm.
        start: Folder of the base checkpoint.
        folder: Folder of the run. The checkpoint is its subfolder "checkpoint"; if it exists, nothing is trained.
        settings: How it is trained.
        seed: Random seed of data and sampling.

    Returns:
        The folder of the checkpoint.
    """
    checkpoint = folder / "checkpoint"
    if (checkpoint / "processor_config.json").is_file():
        return checkpoint
    model = ConceptSegForSegmentation.from_pretrained(start)
    processor = ConceptSegProcessor.from_pretrained(start)
    if not arm.meta_reasoning:
        processor = short_processor(processor)
    torch.manual_seed(seed)
    if arm.new_ctm:
        model.ctm.apply(model._init_weights)
    if arm.supervised:
        _train_supervised(model, settings, seed)
    else:
        _train_by_reinforcement(arm, model, processor, folder, settings, seed)
    write_checkpoint(model, processor, checkpoint)
    return checkpoint


def training_samples(count: int, seed: int) -> list[ConceptSample]:
    """Samples of the families whose correct choice the start has not been trained on."""
    mix, samples = TaskMix(), []
    number = FIRST_TASK + 1_000_000 * seed
    while len(samples) < count:
        if mix.family(number) in UNTAUGHT_FAMILIES:
            source, index = mix.place(number)
            samples.append(source[index])
        number += 1
    return samples


def _train_by_reinforcement(
    arm: Arm,
    model: ConceptSegForSegmentation,
    processor: ConceptSegProcessor,
    folder: Path,
    settings: TrainSettings,
    seed: int,
) -> None:
    samples = training_samples(settings.steps * settings.prompts, seed)
    per_step = settings.prompts * settings.num_generations
    args = MetaGRPOConfig(
        str(folder / "run"),
        rewards=list(arm.rewards),
        meta_without_proxy="box",
        meta_reasoning=arm.meta_reasoning,
        seg_loss_weight=arm.seg_loss_weight,
        num_generations=settings.num_generations,
        num_best_and_worst=settings.num_best_and_worst,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=per_step // settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        beta=settings.beta,
        max_steps=settings.steps,
        max_completion_length=64,
        freeze_vision_tower=True,
        sam_decode_batch_size=64,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        log_examples=0,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = MetaGRPOTrainer(
        model=model,
        reward_funcs=[random_reward(seed)] if arm.random_rewards else None,
        args=args,
        train_dataset=split_reference_dataset(samples, processor=processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    model.sam = trainer.concept_model.sam


def random_reward(seed: int) -> Callable[..., list[float]]:
    """A reward that is uniform in [0, 1] and independent of the completion."""
    rng = np.random.default_rng(seed)

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        return rng.random(len(completions)).tolist()

    reward.__name__ = "random"
    return reward


def _train_supervised(model: ConceptSegForSegmentation, settings: TrainSettings, seed: int) -> None:
    """Trains the VLM on ground-truth completions of the same samples, with as many examples as are trained on there."""
    count = settings.num_best_and_worst
    trained = settings.completions if count is None else settings.steps * settings.prompts * 2 * count
    stage = VlmStage(1, max(1, trained // _SFT_BATCH), held_out=1, seed=seed)
    stage.module.vlm = model.vlm
    for name, parameter in model.vlm.named_parameters():
        parameter.requires_grad_("visual" not in name)
    parameters = [p for p in model.vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.99))
    mix, number = TaskMix(), FIRST_TASK + 1_000_000 * seed
    model.vlm.train()
    progress = progress_bar(stage.steps, "steps", "sft")
    for step in range(stage.steps):
        examples = []
        while len(examples) < _SFT_BATCH:
            if mix.family(number) in UNTAUGHT_FAMILIES:
                examples.append(
                    stage.writer.task(np.random.default_rng([23, seed, number]), mix.task(number))
                )
            number += 1
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
    """The settings in one line, for reports."""
    return ", ".join(f"{name} {value}" for name, value in asdict(settings).items())


def evaluation_samples(count: int) -> dict[str, list[ConceptSample]]:
    """The held-out samples of each evaluation set: trained families, held-out rules, compositional looks."""
    return {
        "trained families": _of_families(
            [ConceptShapes("test", size=SIDE), *_groups("test", ("which one", "hidden rule"))], count
        ),
        "held-out rules": _of_families(_groups("test-rules", ("hidden rule",)), count),
        "compositional looks": _of_families(
            [
                ConceptShapes("test-compositional", size=SIDE),
                *_groups("test-compositional", ("which one", "hidden rule")),
            ],
            count,
        ),
    }


def _groups(split: str, names: Sequence[str]) -> list[ConceptShapes]:
    return [ConceptShapes(split, size=SIDE, groups=[name]) for name in names]


def _of_families(sources: Sequence[ConceptShapes], count: int) -> list[ConceptSample]:
    """The first samples of the untaught families, taken from the sources in turn."""
    iterators = [_samples_of(source) for source in sources]
    samples: list[ConceptSample] = []
    while len(samples) < count:
        for iterator in iterators:
            if len(samples) < count:
                samples.append(next(iterator))
    return samples


def _samples_of(source: ConceptShapes) -> Any:
    for index in range(len(source)):
        if source.slot(index).family.__name__ in UNTAUGHT_FAMILIES:
            sample = source[index]
            if sample.present:
                yield sample
