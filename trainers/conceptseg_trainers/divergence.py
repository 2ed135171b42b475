"""A training that diverged stops: at a loss that is not finite, and before weights that are not finite are saved."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conceptseg_hf.finite import find_nonfinite

from .checkpoints import last_good_checkpoint, run_folder, staged, checkpoint_writer


class DivergedError(RuntimeError):
    """The loss or the weights of a training are no longer finite; the message is one sentence."""


class DivergenceCheckTrainer(Trainer):
    """A Trainer that stops, and saves nothing more, once its numbers are not finite; and saves nothing by halves."""

    model: nn.Module

    def check_loss(self, loss: Tensor) -> None:
        """To be called with each loss.

        Raises:
            DivergedError: If it is not finite.
        """
        if not math.isfinite(value := loss.detach().item()):
            step = self.state.global_step
            where = f"in step {step + 1}" if self.model.training else f"in the evaluation after step {step}"
            raise self.diverged(f"the loss is {value} {where}")

    def check_weights(self) -> None:
        """To be called before weights are saved.

        Raises:
            DivergedError: If one that is trained is not finite.
        """
        trained = (
            (name, _own_part(weight))
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        )
        if wrong := find_nonfinite(trained):
            raise self.diverged(
                f"weights are not finite after step {self.state.global_step} ({wrong[0]}, ...)"
            )

    def diverged(self, what: str) -> DivergedError:
        """The error that ends the training; names the last good checkpoint."""
        good = last_good_checkpoint(run_folder(self.args), self.state.global_step)
        where = (
            "no checkpoint was saved before" if good is None else f"the last good checkpoint is {str(good)!r}"
        )
        return DivergedError(
            f"the training diverged: {what}; {where}; train again with a lower learning_rate than "
            f"{self.args.learning_rate:g}, in another output_dir."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; the Trainer's own calls save a checkpoint, see `_save_checkpoint`."""
        self.check_weights()
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        with staged(output_dir or run_folder(self.args), self.args.should_save) as folder:
            super().save_model(str(folder), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        if not math.isfinite(self.state.best_metric or 0.0):  # where nothing was measured yet
            self.state.best_metric = None
        run = self._get_output_dir(trial=trial)
        folder = f"{run}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint_writer(folder, run, self.args.should_save):
            super()._save_checkpoint(model, trial)


class FiniteLogs(TrainerCallback):
    """Keeps numbers that are not finite (a reward that no sample has) out of trainer_state.json, as JSON has none."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What a resumed run has logged so far."""
        state.log_history = [_finite(entry) for entry in state.log_history]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last entry."""
        if state.log_history:
            state.log_history[-1] = _finite(state.log_history[-1])


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in entry.items() if not isinstance(value, float) or math.isfinite(value)
    }


def _own_part(weight: Tensor) -> Tensor:
    """The share of a weight that this process holds under ZeRO-3 or FSDP2, else all of it."""
    weight = getattr(weight, "ds_tensor", weight)
    return weight.to_local() if hasattr(weight, "to_local") else weight
