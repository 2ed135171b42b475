"""Callbacks of both trainers: example images, and a warning if only the format reward increases."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from conceptseg_hf.visualization import scaled_overlay, side_by_side
from conceptseg_hf.writing import image_bytes, write_file

from .checkpoints import run_folder

logger = logging.getLogger(__name__)

_REWARD = re.compile(r"rewards/(.+)/mean")


@dataclass(frozen=True, eq=False)
class TrainingExample:
    """A completion and its mask during training.

    Attributes:
        target: The target image.
        gt_mask: Ground-truth mask, (H, W) bool, of the target's size, or None.
        predicted_mask: Predicted mask, (H, W) bool, of the target's size, or None.
        mosaic: The reference mosaic that the VLM reads, or None without references.
        rule: The rule of the completion; None if it is missing.
        answer: The noun phrase of the completion; None if it is missing.
        rewards: Values to print in the caption, by name, such as the parts of the reward.
    """

    target: Image.Image
    gt_mask: np.ndarray | None = None
    predicted_mask: np.ndarray | None = None
    mosaic: Image.Image | None = None
    rule: str | None = None
    answer: str | None = None
    rewards: dict[str, float] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """Rule, answer and rewards, one per line."""
        lines = [f"rule: {self.rule or 'none given'}", f"answer: {self.answer or 'none given'}"]
        if self.rewards:
            lines.append("; ".join(f"{name} {value:.2f}" for name, value in self.rewards.items()))
        return "\n".join(lines)

    def draw(self, height: int = 320) -> Image.Image:
        """Draw the mosaic, and the target with the ground-truth and with the predicted mask, above the caption."""
        tiles = [] if self.mosaic is None else [("references", self.mosaic)]
        tiles.append(("target, ground truth", scaled_overlay(self.target, self.gt_mask, height)))
        tiles.append(("target, prediction", scaled_overlay(self.target, self.predicted_mask, height)))
        return side_by_side(tiles, self.caption, height)


class TrainerWithExamples(Protocol):
    """A trainer that keeps examples for `ExampleImagesCallback`."""

    examples: list[TrainingExample]
    callback_handler: CallbackHandler


def reported_to(args: TrainingArguments) -> list[str]:
    """Return `report_to`, which Transformers always converts to a list although its type is wider."""
    return cast(list[str], args.report_to)


class ExampleImagesCallback(TrainerCallback):
    """Draw `trainer.examples` every `every` steps and after each evaluation; each example is drawn once.

    The images are saved to `<output_dir>/examples/step_<step>_<number>.png`, and logged to TensorBoard, trackio and
    Weights & Biases if `report_to` includes them.

    Args:
        trainer: Trainer that fills its list `examples` with `TrainingExample`s.
        every: Number of steps between images; 0 draws only after evaluations.
        count: Maximum number of images to draw at once.
    """

    def __init__(self, trainer: TrainerWithExamples, every: int, count: int) -> None:
        self.trainer = trainer
        self.every = every
        self.count = count

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the examples at multiples of `every`."""
        if self.every and state.global_step % self.every == 0:
            self._draw(args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the examples of the evaluation."""
        self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        examples, self.trainer.examples = self.trainer.examples[: self.count], []
        if not examples or not state.is_world_process_zero:
            return
        folder = Path(run_folder(args)) / "examples"
        for number, example in enumerate(examples):
            image = example.draw()
            path = folder / f"step_{state.global_step:06d}_{number}.png"
            try:
                write_file(path, image_bytes(image))
            except OSError as error:  # should not end the training
                logger.warning("%s", error)
            self._report(f"examples/{number}", image, example.caption, args, state.global_step)

    def _report(self, key: str, image: Image.Image, caption: str, args: TrainingArguments, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(key, np.asarray(image), step, dataformats="HWC")
        if "wandb" in reported_to(args):
            import wandb

            wandb.log({key: wandb.Image(image, caption=caption), "train/global_step": step})
        if "trackio" in reported_to(args):
            import trackio

            trackio.log({key: trackio.Image(image, caption=caption)})  # trackio drops lists of images


class FormatOnlyWarning(TrainerCallback):
    """Warn if the format reward increases and no other reward does.

    Every `window` logs, the mean of the last `window` logged values is compared with the mean of the first `window`. A
    policy that learns only the template also increases the total reward.

    Args:
        window: Number of logged values to average.
        rise: Minimum increase of the format reward for a warning.
        tolerance: Increase of another reward from which on there is no warning.
    """

    def __init__(self, window: int = 10, rise: float = 0.1, tolerance: float = 0.02) -> None:
        self.window = window
        self.rise = rise
        self.tolerance = tolerance
        self.history: list[dict[str, float]] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Store the finite means of the rewards (`rewards/<name>/mean`) and compare them every `window` logs."""
        rewards = {
            match[1]: float(value)
            for key, value in (logs or {}).items()
            if (match := _REWARD.fullmatch(key)) and value is not None and math.isfinite(value)
        }
        if "format" not in rewards:
            return
        self.history.append(rewards)
        if len(self.history) < 2 * self.window or len(self.history) % self.window:
            return
        gains = {name: self._gain(name) for name in rewards}
        format_gain = gains.pop("format")
        if format_gain >= self.rise and gains and max(gains.values()) < self.tolerance:
            logger.warning(
                "Only the format reward increases (format %+.2f, %s since the start), so the policy learns the "
                "template and not the task; increase the reward_weights of the other rewards, sample more completions "
                "at a higher temperature, or start from a stage I model that predicts non-empty masks.",
                format_gain,
                ", ".join(f"{name} {gain:+.2f}" for name, gain in gains.items()),
            )

    def _gain(self, name: str) -> float:
        """Return the increase of a reward from the first to the last window; 0 if one of them has no value."""
        means = []
        for logs in (self.history[: self.window], self.history[-self.window :]):
            values = [entry[name] for entry in logs if name in entry]
            means.append(sum(values) / len(values) if values else math.nan)
        gain = means[1] - means[0]
        return gain if math.isfinite(gain) else 0.0


class EpochCallback(TrainerCallback):
    """Pass the epoch to the dataset or collator, also after resuming; accelerate only passes it to the sampler.

    Args:
        set_epoch: Called with the index of the epoch, starting at 0.
    """

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch; a run that resumes at epoch 1.25 is in epoch 1."""
        self.set_epoch(int(state.epoch or 0))
