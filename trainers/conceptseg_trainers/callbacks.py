"""What both trainers show while they run: example pictures, and a warning when only the format is learned."""

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
    """One completion and its mask, as a trainer saw them.

    Attributes:
        target: The target image.
        gt_mask: (H, W) bool, of the target's size; None shows none.
        predicted_mask: (H, W) bool, likewise.
        mosaic: The references as the VLM saw them, if there were any.
        rule: The rule of the completion; None when it is missing.
        answer: The noun phrase of the completion; None when it is missing.
        rewards: Numbers to print below, by name, such as the parts of the reward.
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
        """Rule, answer and numbers, a line each."""
        lines = [f"rule: {self.rule or 'none given'}", f"answer: {self.answer or 'none given'}"]
        if self.rewards:
            lines.append("; ".join(f"{name} {value:.2f}" for name, value in self.rewards.items()))
        return "\n".join(lines)

    def draw(self, height: int = 320) -> Image.Image:
        """Mosaic | target and true mask | target and predicted mask, over the caption."""
        tiles = [] if self.mosaic is None else [("references", self.mosaic)]
        tiles.append(("target, true mask", scaled_overlay(self.target, self.gt_mask, height)))
        tiles.append(("target, predicted mask", scaled_overlay(self.target, self.predicted_mask, height)))
        return side_by_side(tiles, self.caption, height)


class TrainerWithExamples(Protocol):
    """A trainer whose examples can be drawn."""

    examples: list[TrainingExample]
    callback_handler: CallbackHandler


def reported_to(args: TrainingArguments) -> list[str]:
    """`report_to`, of which Transformers makes a list although its type admits more."""
    return cast(list[str], args.report_to)


class ExampleImagesCallback(TrainerCallback):
    """Draws `trainer.examples` every some steps and after each evaluation, each example once.

    The pictures go to `<output_dir>/examples/step_<step>_<number>.png`, and to TensorBoard, trackio and
    Weights & Biases where `report_to` names them.

    Args:
        trainer: Fills its list `examples` with `TrainingExample`s.
        every: Steps between pictures; 0 draws after evaluations only.
        count: Pictures at a time.
    """

    def __init__(self, trainer: TrainerWithExamples, every: int, count: int) -> None:
        self.trainer = trainer
        self.every = every
        self.count = count

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws at multiples of `every`."""
        if self.every and state.global_step % self.every == 0:
            self._draw(args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws what the evaluation left."""
        self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        examples, self.trainer.examples = self.trainer.examples[: self.count], []
        if not examples or not state.is_world_process_zero:
            return
        folder = Path(run_folder(args)) / "examples"
        for number, example in enumerate(examples):
            picture = example.draw()
            path = folder / f"step_{state.global_step:06d}_{number}.png"
            try:
                write_file(path, image_bytes(picture))
            except OSError as error:  # no reason to end a training
                logger.warning("%s", error)
            self._report(f"examples/{number}", picture, example.caption, args, state.global_step)

    def _report(
        self, key: str, picture: Image.Image, caption: str, args: TrainingArguments, step: int
    ) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(key, np.asarray(picture), step, dataformats="HWC")
        if "wandb" in reported_to(args):
            import wandb

            wandb.log({key: wandb.Image(picture, caption=caption), "train/global_step": step})
        if "trackio" in reported_to(args):
            import trackio

            trackio.log({key: trackio.Image(picture, caption=caption)})  # lists of images are dropped there


class FormatOnlyWarning(TrainerCallback):
    """Warns when the format reward rises and no other reward does.

    The mean of the last `window` logged values is compared with that of the first `window`, every `window`
    logs. A policy that learns the template alone looks like progress in the total reward.

    Args:
        window: Logged values that are averaged.
        rise: What the format reward must have gained.
        tolerance: What no other reward has gained.
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
        """Keeps the mean of each reward (`rewards/<name>/mean`, if it has one) and looks at them now and then."""
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
                "Only the format reward rises (format %+.2f, %s since the start): the policy learns the template, "
                "not the task; weigh the other rewards more (reward_weights), sample more completions at a higher "
                "temperature, or begin with a model of stage I whose masks are not empty.",
                format_gain,
                ", ".join(f"{name} {gain:+.2f}" for name, gain in gains.items()),
            )

    def _gain(self, name: str) -> float:
        """How much a reward gained between the first and the last window; 0 while it has no value."""
        means = []
        for logs in (self.history[: self.window], self.history[-self.window :]):
            values = [entry[name] for entry in logs if name in entry]
            means.append(sum(values) / len(values) if values else math.nan)
        gain = means[1] - means[0]
        return gain if math.isfinite(gain) else 0.0


class EpochCallback(TrainerCallback):
    """Tells the data which epoch begins, on resuming too; accelerate's own `set_epoch` stops at the sampler.

    Args:
        set_epoch: Called with the number of the epoch, from 0.
    """

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Epoch 1.25, where a resumed run begins, belongs to epoch 1."""
        self.set_epoch(int(state.epoch or 0))
