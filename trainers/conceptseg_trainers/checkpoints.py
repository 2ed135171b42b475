"""Find the complete checkpoints of a run, and write checkpoints and models without leaving partial results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard, cast

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from conceptseg_hf.finite import is_finite
from conceptseg_hf.writing import write_error

TRAINER_STATE = "trainer_state.json"  # the last file that the Trainer writes to a checkpoint
PROCESSOR = "processor_config.json"  # both trainers write it after the weights of a complete model
_STAGING = ".saving"
_CARD = "README.md"


def run_folder(args: TrainingArguments) -> str:
    """Return the folder of a run: `output_dir`, which Transformers always sets although its type is optional."""
    return cast(str, args.output_dir)


def complete_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Return the checkpoints of a run, ordered by step, without incomplete ones (after a kill or on a full disk)."""
    folders = [
        folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_complete(folder)
    ]
    return sorted(folders, key=step_of)


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a folder is a completely written checkpoint."""
    try:
        return isinstance(json.loads((Path(folder) / TRAINER_STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint from the name of its folder, or -1 for other names."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def last_good_checkpoint(output_dir: str | os.PathLike, step: int) -> Path | None:
    """Return the last checkpoint with finite weights before `step`, which is therefore known to give a finite loss.

    Args:
        output_dir: Folder of the run.
        step: Number of completed steps when a loss that is not finite occurs.
    """
    for folder in reversed(complete_checkpoints(output_dir)):
        if step_of(folder) < step and _has_finite_weights(folder):
            return folder
    return None


def _has_finite_weights(folder: Path) -> bool:
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                # `safe_open` does not return a mapping
                if not all(is_finite(file.get_tensor(name)) for name in file.keys()):  # noqa: SIM118
                    return False
    except (OSError, SafetensorError):
        return False
    return True


@contextmanager
def checkpoint_writer(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, is_writer: bool
) -> Iterator[None]:
    """Context manager for writing a checkpoint that removes a partially written checkpoint after an error.

    Args:
        checkpoint: Folder of the checkpoint.
        output_dir: Folder of the run.
        is_writer: Whether this process writes.

    Raises:
        WriteError: If the checkpoint cannot be written; the message names the last complete one.
    """
    checkpoint = Path(checkpoint)
    if is_writer:
        (checkpoint / TRAINER_STATE).unlink(missing_ok=True)  # an old file would make it look complete
    try:
        yield
    except BaseException as error:
        if is_writer and not is_complete(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        # An error after the checkpoint is complete has another cause, such as an upload.
        if not _is_write_error(error) or is_complete(checkpoint):
            raise
        last = next(reversed(complete_checkpoints(output_dir)), None)
        status = "no earlier checkpoint was saved" if last is None else f"{str(last)!r} is complete"
        remedy = f"free some disk space and resume, or use another output_dir; {status}"
        raise write_error(checkpoint, _with_reason(error), remedy) from error


@contextmanager
def staged(target: str | os.PathLike, is_writer: bool) -> Iterator[Path]:
    """Context manager that returns a staging folder; its files are moved to `target` on success.

    Args:
        target: Destination folder, in which files of the same names are replaced.
        is_writer: Whether this process writes; other processes only use the name of the folder.

    Raises:
        WriteError: If the files cannot be written; `target` is not changed in this case.
    """
    target = Path(target)
    staging = target / _STAGING
    try:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            if (target / _CARD).is_file():  # the Trainer only writes a model card if there is none
                shutil.copy2(target / _CARD, staging / _CARD)
        yield staging
        if is_writer:
            _move_files(staging, target)
    except Exception as error:
        if not _is_write_error(error):
            raise
        raise write_error(
            target, _with_reason(error), "free some disk space, or use another folder"
        ) from error
    finally:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)


def _move_files(staging: Path, target: Path) -> None:
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name == PROCESSOR)  # last, as it marks the model as complete
    weights = {path.name for path in files if path.parent == Path() and path.name.startswith("model")}
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / path).replace(target / path)
    for old in target.glob("model*.safetensors*") if weights else ():
        if old.name not in weights:  # a shard of the previous model
            old.unlink()


def _is_write_error(error: BaseException) -> TypeGuard[Exception]:
    """Whether an error occurred while writing a file; PyTorch raises RuntimeErrors, which have other causes, too."""
    pytorch_sources = ("inline_container", "PytorchStreamWriter")
    return isinstance(error, (OSError, SafetensorError)) or (
        isinstance(error, RuntimeError) and any(source in str(error) for source in pytorch_sources)
    )


def _with_reason(error: Exception) -> Exception:
    """Replace the RuntimeError of PyTorch's file writer, which does not contain the reason, by an OSError."""
    return (
        OSError("PyTorch wrote a file only partially, which happens if the disk is full")
        if isinstance(error, RuntimeError)
        else error
    )
