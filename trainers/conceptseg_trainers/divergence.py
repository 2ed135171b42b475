"""Stop a training that has diverged: when the loss is not finite, or before weights that are not finite are saved."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conceptseg_hf.finite import find_nonfinite

from .checkpoints import checkpoint_writer, last_good_checkpoint, run_folder, staged


class DivergedError(RuntimeError):
    """Raised when the loss or the weights are not finite; the message is one sentence."""


class DivergenceCheckTrainer(Trainer):
    """A Trainer that stops without saving if loss or weights are not finite, and leaves no partially written files."""

    model: nn.Module

    def check_loss(self, loss: Tensor) -> None:
        """Check that a loss is finite; subclasses call this method with each loss.

        Raises:
            DivergedError: If the loss is not finite.
        """
        if not math.isfinite(value := loss.detach().item()):
            step = self.state.global_step
            where = f"in step {step + 1}" if self.model.training else f"in the evaluation after step {step}"
            raise self.diverged(f"the loss is {value} {where}")

    def check_weights(self) -> None:
        """Check that the trained weights are finite, before they are saved.

        Raises:
            DivergedError: If a trained weight is not finite.
        """
        trained = (
            (name, _local_shard(weight))
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        )
        if wrong := find_nonfinite(trained):
            raise self.diverged(
                f"weights are not finite after step {self.state.global_step} ({wrong[0]}, ...)"
            )

    def diverged(self, what: str) -> DivergedError:
        """Return the error that ends the training; its message names the last good checkpoint."""
        good = last_good_checkpoint(run_folder(self.args), self.state.global_step)
        where = (
            "no checkpoint was saved before" if good is None else f"the last good checkpoint is {str(good)!r}"
        )
        return DivergedError(
            f"the training diverged: {what}; {where}; train again with a learning_rate below "
            f"{self.args.learning_rate:g} and another output_dir."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; internal calls of the Trainer save a checkpoint, see `_save_checkpoint`."""
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
        if not math.isfinite(self.state.best_metric or 0.0):  # if no metric has been computed yet
            self.state.best_metric = None
        run = self._get_output_dir(trial=trial)
        folder = f"{run}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoint_writer(folder, run, self.args.should_save):
            super()._save_checkpoint(model, trial)


class FiniteLogs(TrainerCallback):
    """Remove NaN and infinity (e.g. a reward that no sample has) from the log, as JSON cannot represent them."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clean the log of a resumed run."""
        state.log_history = [_finite(entry) for entry in state.log_history]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clean the last entry of the log."""
        if state.log_history:
            state.log_history[-1] = _finite(state.log_history[-1])


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in entry.items() if not isinstance(value, float) or math.isfinite(value)
    }


def _local_shard(weight: Tensor) -> Tensor:
    """Return the shard of a weight that this process holds with ZeRO-3 or FSDP2, otherwise the full weight."""
    weight = getattr(weight, "ds_tensor", weight)
    return weight.to_local() if hasattr(weight, "to_local") else weight
