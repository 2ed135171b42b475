"""How a script runs: checks before the model is loaded, resuming, what it says, and how it ends."""

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

# What Transformers reports to without counting it among what is available: it depends on more than a package.
_UNCOUNTED = {"azure_ml", "flyte", "kubeflow"}


def run(trainer: Trainer) -> None:
    """Trains, from a checkpoint if the settings say so, and saves the complete model to `output_dir`.

    Says whether it resumes, where results lie, and, when it is stopped by Ctrl-C, how to go on. A run that has all its
    steps behind it is left as it is; if it was killed before its model was saved, that is made up for.

    Raises:
        DivergedError: If the loss or weights are not finite.
        OSError: If a checkpoint or the model cannot be written.
        KeyboardInterrupt: With a sentence that says how to go on.
    """
    try:
        _run(trainer)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(trainer)) from None
    trainer.end()
    if trainer.accelerator.num_processes > 1:
        wait_for_gloo_threads()


def _run(trainer: Trainer) -> None:
    checkpoint = find_resume_checkpoint(trainer.args)
    if checkpoint is None or not _is_finished(trainer.args, checkpoint):
        _warn_of_another_rate(trainer, checkpoint)
        if checkpoint is not None:
            _notify(
                trainer, f"resuming from {checkpoint!r}, after step {_state_of(checkpoint)['global_step']}."
            )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    else:
        if not _is_saved(trainer.args, checkpoint):
            with _no_steps(trainer.args):
                trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
        _warn(
            trainer,
            f"the run of {checkpoint!r} is finished, so nothing was trained; give another --output_dir for a new one, "
            "or a larger --max_steps or --num_train_epochs to go on.",
        )
    _report_results(trainer)


def _report_results(trainer: Trainer) -> None:
    folder = Path(run_folder(trainer.args))
    what = "the adapters are" if is_peft_model(trainer.model) else "the trained model is"
    _notify(
        trainer,
        f"{what} in {str(folder)!r}, checkpoints of the run in its folders {PREFIX_CHECKPOINT_DIR}-*.",
    )
    if (folder / "examples").is_dir():
        _notify(trainer, f"example pictures are in {str(folder / 'examples')!r}.")
    if not is_peft_model(trainer.model):
        _notify(
            trainer, f"try it with: conceptseg segment IMAGE --prompt TEXT --model {shlex.quote(str(folder))}"
        )


def _how_to_go_on(trainer: Trainer) -> str:
    step, args = trainer.state.global_step, trainer.args
    last = next(reversed(complete_checkpoints(run_folder(args))), None)
    if last is None:
        return f"stopped after step {step}; no checkpoint was saved yet, so the same command begins anew."
    auto = (
        "the same command goes"
        if args.resume_from_checkpoint == "auto"
        else "with --resume_from_checkpoint auto it goes"
    )
    return f"stopped after step {step}; {auto} on from {str(last)!r}."


def _notify(trainer: Trainer, message: str) -> None:
    if trainer.is_world_process_zero():
        print_line(message, sys.stdout)


def _state_of(checkpoint: str) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8"))


def _is_finished(args: TrainingArguments, checkpoint: str) -> bool:
    """Whether a checkpoint has all steps of the run behind it; the Trainer would take one more."""
    state = _state_of(checkpoint)
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["epoch"] >= args.num_train_epochs


def _is_saved(args: TrainingArguments, checkpoint: str) -> bool:
    """Whether the complete model was saved after a checkpoint."""
    saved = Path(run_folder(args)) / PROCESSOR
    return saved.is_file() and saved.stat().st_mtime >= (Path(checkpoint) / TRAINER_STATE).stat().st_mtime


@contextmanager
def _no_steps(args: TrainingArguments) -> Iterator[None]:
    """Lets `train` read a checkpoint and take no step."""
    wanted = args.max_steps, args.num_train_epochs
    args.max_steps, args.num_train_epochs = -1, 0
    try:
        yield
    finally:
        args.max_steps, args.num_train_epochs = wanted


def _warn_of_another_rate(trainer: Trainer, checkpoint: str | None) -> None:
    """Warns where the learning rate asked for gives way to the checkpoint's (the Trainer warns of batch sizes)."""
    path = Path(checkpoint or "") / _SCHEDULER
    if checkpoint is None or not path.is_file():
        return
    rates = torch.load(path, map_location="cpu", weights_only=True).get("base_lrs", [])
    if rates and trainer.args.learning_rate not in rates:
        _warn(
            trainer,
            f"learning_rate is {trainer.args.learning_rate}, but {checkpoint!r} goes on with its own, {rates[0]}; "
            "another one needs a new run, in another --output_dir.",
        )


def _warn(trainer: Trainer, message: str) -> None:
    if trainer.is_world_process_zero():
        logger.warning(message)


def check_run(args: TrainingArguments) -> None:
    """Finds what the Trainer would find only when the model is loaded.

    Raises:
        ValueError: If the run's folder cannot be written, there is no checkpoint to resume from, or Transformers does
            not know where to report to.
        ImportError: If a package to report to is missing.
    """
    _check_output_dir(args)
    find_resume_checkpoint(args)
    _check_report_to(args)


def _check_output_dir(args: TrainingArguments) -> None:
    fault = find_write_error(Path(run_folder(args)))
    if fault is not None:
        raise ValueError(f"output_dir {args.output_dir!r} cannot be written: {fault}; give another folder.")


def _check_report_to(args: TrainingArguments) -> None:
    available = {*get_available_reporting_integrations(), *_UNCOUNTED}
    for name in reported_to(args):
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to is {name!r}; use one of {', '.join(INTEGRATION_TO_CALLBACK)}, or all of them that are "
                "installed (all), or none."
            )
        if name not in available:
            raise ImportError(
                f"report_to is {name!r}, a package that is not installed; install it with: pip install {name}"
            )


def find_resume_checkpoint(args: TrainingArguments) -> str | None:
    """The folder to resume from.

    Args:
        args: With `resume_from_checkpoint`: a folder, or "auto" for the last complete checkpoint of
            `output_dir`, which may not be there yet.

    Raises:
        ValueError: If the folder is no complete checkpoint.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "auto":
        if not is_complete(wanted):
            raise ValueError(
                f"resume_from_checkpoint is {wanted!r}, which is no complete checkpoint; give the folder of one, "
                'or "auto" for the last of output_dir.'
            )
        return wanted
    last = next(reversed(complete_checkpoints(run_folder(args))), None)
    return None if last is None else str(last)


def main(prepare: Callable[[Sequence[str]], Trainer]) -> int:
    """Runs a script on the words of its command line.

    Returns:
        The exit code: 0; 2 after bad input, or a training that diverged or could not be saved, which is explained in
        one sentence on standard error; 130 after Ctrl-C.
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
