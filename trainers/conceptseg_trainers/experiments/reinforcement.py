"""Training of an arm with sampled completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.data import ConceptSample
from conceptseg_hf.progress import progress_bar

from ..grpo_trainer import SegmentationGRPOTrainer
from ..meta_grpo_config import MetaGRPOConfig
from ..meta_grpo_trainer import MetaGRPOTrainer
from ..split_reference import split_reference_dataset
from .arms import Arm
from .settings import TrainSettings


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
