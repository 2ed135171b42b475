"""Run a training script: checks before the model is loaded, resuming, messages, and exit codes."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conceptseg_hf.cli.outputs import find_write_error
from conceptseg_hf.errors import one_line
from conceptseg_hf.evaluation.distributed import wait_for_gloo_threads
from conceptseg_hf.progress import hide_bars_in_pipes, print_line

from ..callbacks import reported_to
from ..checkpoints import PROCESSOR, TRAINER_STATE, complete_checkpoints, is_complete, run_folder
from ..divergence import DivergedError

logger = logging.getLogger(__name__)

_SCHEDULER = "scheduler.pt"

# Integrations that Transformers does not list as available, because they depend on more than a package.
_UNLISTED_INTEGRATIONS = {"azure_ml", "flyte", "kubeflow"}


def run(trainer: Trainer) -> None:
    """Train, resuming from a checkpoint if configured, and save the complete model to `output_dir`.

    Reports whether the run resumes, where the results are, and, after Ctrl-C, how to resume. A finished run is not
    changed, except that its model is saved if the run was killed before saving it.

    Raises:
        DivergedError: If the loss or the weights are not finite.
        OSError: If a checkpoint or the model cannot be written.
        KeyboardInterrupt: After Ctrl-C, with a message that says how to resume.
    """
    try:
        _run(trainer)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_resume_hint(trainer)) from None
    trainer.end()
    if trainer.accelerator.num_processes > 1:
        wait_for_gloo_threads()


def _run(trainer: Trainer) -> None:
    checkpoint = find_resume_checkpoint(trainer.args)
    if checkpoint is None or not _is_finished(trainer.args, checkpoint):
        _warn_of_ignored_learning_rate(trainer, checkpoint)
        if checkpoint is not None:
            _notify(
                trainer, f"resuming from {checkpoint!r}, after step {_state_of(checkpoint)['global_step']}."
            )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    else:
        if not _is_saved(trainer.args, checkpoint):
            with _zero_steps(trainer.args):
                trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
        _warn(
            trainer,
            f"the run of {checkpoint!r} is finished, so nothing was trained; use another --output_dir for a new run, "
            "or a larger --max_steps or --num_train_epochs to continue.",
        )
    _report_results(trainer)


def _report_results(trainer: Trainer) -> None:
    folder = Path(run_folder(trainer.args))
    what = "the adapters are" if is_peft_model(trainer.model) else "the trained model is"
    _notify(
        trainer,
        f"{what} in {str(folder)!r}; its subfolders {PREFIX_CHECKPOINT_DIR}-* are the checkpoints of the run.",
    )
    if (folder / "examples").is_dir():
        _notify(trainer, f"example images are in {str(folder / 'examples')!r}.")
    if not is_peft_model(trainer.model):
        _notify(
            trainer, f"try it with: conceptseg segment IMAGE --prompt TEXT --model {shlex.quote(str(folder))}"
        )


def _resume_hint(trainer: Trainer) -> str:
    step, args = trainer.state.global_step, trainer.args
    last = next(reversed(complete_checkpoints(run_folder(args))), None)
    if last is None:
        return f"stopped after step {step}; no checkpoint has been saved, so the same command starts from scratch."
    remedy = (
        "run the same command"
        if args.resume_from_checkpoint == "auto"
        else "add --resume_from_checkpoint auto to the command"
    )
    return f"stopped after step {step}; {remedy} to resume from {str(last)!r}."


def _notify(trainer: Trainer, message: str) -> None:
    if trainer.is_world_process_zero():
        print_line(message, sys.stdout)


def _state_of(checkpoint: str) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8"))


def _is_finished(args: TrainingArguments, checkpoint: str) -> bool:
    """Whether a checkpoint was written after the last step of the run; the Trainer would still take one more step."""
    state = _state_of(checkpoint)
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["epoch"] >= args.num_train_epochs


def _is_saved(args: TrainingArguments, checkpoint: str) -> bool:
    """Whether the complete model was saved after a checkpoint."""
    saved = Path(run_folder(args)) / PROCESSOR
    return saved.is_file() and saved.stat().st_mtime >= (Path(checkpoint) / TRAINER_STATE).stat().st_mtime


@contextmanager
def _zero_steps(args: TrainingArguments) -> Iterator[None]:
    """Temporarily set the number of steps to zero, so that `train` only loads a checkpoint."""
    original = args.max_steps, args.num_train_epochs
    args.max_steps, args.num_train_epochs = -1, 0
    try:
        yield
    finally:
        args.max_steps, args.num_train_epochs = original


def _warn_of_ignored_learning_rate(trainer: Trainer, checkpoint: str | None) -> None:
    """Warn if the checkpoint's learning rate overrides the given one (the Trainer warns about batch sizes itself)."""
    path = Path(checkpoint or "") / _SCHEDULER
    if checkpoint is None or not path.is_file():
        return
    rates = torch.load(path, map_location="cpu", weights_only=True).get("base_lrs", [])
    if rates and trainer.args.learning_rate not in rates:
        _warn(
            trainer,
            f"learning_rate is {trainer.args.learning_rate}, but {checkpoint!r} continues with its own, {rates[0]}; "
            "start a new run in another --output_dir to change it.",
        )


def _warn(trainer: Trainer, message: str) -> None:
    if trainer.is_world_process_zero():
        logger.warning(message)


def check_run(args: TrainingArguments) -> None:
    """Check settings before the model is loaded that the Trainer would check only afterwards.

    Raises:
        ValueError: If `output_dir` cannot be written, `resume_from_checkpoint` is not a complete checkpoint, or
            `report_to` is unknown.
        ImportError: If a package of `report_to` is missing.
    """
    _check_output_dir(args)
    find_resume_checkpoint(args)
    _check_report_to(args)


def _check_output_dir(args: TrainingArguments) -> None:
    fault = find_write_error(Path(run_folder(args)))
    if fault is not None:
        raise ValueError(f"output_dir {args.output_dir!r} cannot be written: {fault}; use another folder.")


def _check_report_to(args: TrainingArguments) -> None:
    available = {*get_available_reporting_integrations(), *_UNLISTED_INTEGRATIONS}
    for name in reported_to(args):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f'report_to is {name!r}; use one of {", ".join(INTEGRATION_TO_CALLBACK)}, "all" for all that are '
                'installed, or "none".'
            )
        if name not in available:
            raise ImportError(
                f"report_to is {name!r}, a package that is not installed; install it with: pip install {name}"
            )


def find_resume_checkpoint(args: TrainingArguments) -> str | None:
    """Return the checkpoint folder to resume from, or None to start a new run.

    Args:
        args: The settings. `resume_from_checkpoint` is a folder, or "auto" for the last complete checkpoint in
            `output_dir`, if there is one.

    Raises:
        ValueError: If the folder is not a complete checkpoint.
    """
    folder = args.resume_from_checkpoint
    if folder is None:
        return None
    if folder != "auto":
        if not is_complete(folder):
            raise ValueError(
                f"resume_from_checkpoint is {folder!r}, which is not a complete checkpoint; use the folder of one, "
                'or "auto" for the last one in output_dir.'
            )
        return folder
    last = next(reversed(complete_checkpoints(run_folder(args))), None)
    return None if last is None else str(last)


def main(prepare: Callable[[Sequence[str]], Trainer]) -> int:
    """Run a script with the arguments of the command line.

    Returns:
        The exit code: 0 on success; 2, with a one-sentence message on standard error, if the input is invalid or the
        training diverges or cannot be saved; 130 after Ctrl-C.
    """
    try:
        hide_bars_in_pipes()
        run(prepare(sys.argv[1:]))
    except (ValueError, ImportError, OSError, DivergedError) as error:
        sys.stderr.write(one_line(error) + "\n")
        return 2
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{str(error) or 'stopped.'}\n")
        return 130
    return 0
