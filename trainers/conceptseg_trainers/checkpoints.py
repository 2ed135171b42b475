"""The folders of a run: which checkpoints are complete, and how one is written so that no half of it stays."""

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

TRAINER_STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
PROCESSOR = "processor_config.json"  # both trainers write it after the weights of the complete model
_STAGING = ".saving"
_CARD = "README.md"


def run_folder(args: TrainingArguments) -> str:
    """The folder of a run: `output_dir`, which Transformers fills in although its type admits None."""
    return cast(str, args.output_dir)


def complete_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run in the order of their steps, without those that a kill or a full disk cut off."""
    folders = [
        folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_complete(folder)
    ]
    return sorted(folders, key=step_of)


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    try:
        return isinstance(json.loads((Path(folder) / TRAINER_STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written; -1 for a folder with another kind of name."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def last_good_checkpoint(output_dir: str | os.PathLike, step: int) -> Path | None:
    """The last checkpoint of a run whose loss was seen to be finite: one before `step`, with finite weights.

    Args:
        output_dir: Folder of the run.
        step: Number of steps after which the loss is not finite.
    """
    for folder in reversed(complete_checkpoints(output_dir)):
        if step_of(folder) < step and _has_finite_weights(folder):
            return folder
    return None


def _has_finite_weights(folder: Path) -> bool:
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                # a safetensors file is no mapping
                if not all(is_finite(file.get_tensor(name)) for name in file.keys()):  # noqa: SIM118
                    return False
    except (OSError, SafetensorError):
        return False
    return True


@contextmanager
def checkpoint_writer(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, is_writer: bool
) -> Iterator[None]:
    """A block that writes a checkpoint of a run: if that fails, the half that was written is removed.

    Args:
        checkpoint: Its folder.
        output_dir: Folder of the run.
        is_writer: Whether this process writes.

    Raises:
        WriteError: If it cannot be written; names the last one that was.
    """
    checkpoint = Path(checkpoint)
    if is_writer:
        (checkpoint / TRAINER_STATE).unlink(missing_ok=True)  # an old one would make it look complete
    try:
        yield
    except BaseException as error:
        if is_writer and not is_complete(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
        if not _is_of_writing(error) or is_complete(checkpoint):  # then what failed came later: an upload
            raise
        last = next(reversed(complete_checkpoints(output_dir)), None)
        kept = "none was saved before" if last is None else f"{str(last)!r} is complete"
        remedy = f"make room and resume, or give another output_dir; {kept}"
        raise write_error(checkpoint, _plain(error), remedy) from error


@contextmanager
def staged(target: str | os.PathLike, is_writer: bool) -> Iterator[Path]:
    """A folder whose files go into `target`, in the place of those of the same names, when the block is through.

    Args:
        target: Where to.
        is_writer: Whether this process writes; the others only need the name.

    Raises:
        WriteError: If the files cannot be written; `target` is then as it was.
    """
    target = Path(target)
    staging = target / _STAGING
    try:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            if (target / _CARD).is_file():  # a model card is only written where there is none
                shutil.copy2(target / _CARD, staging / _CARD)
        yield staging
        if is_writer:
            _move_files(staging, target)
    except Exception as error:
        if not _is_of_writing(error):
            raise
        raise write_error(target, _plain(error), "make room, or give another folder") from error
    finally:
        if is_writer:
            shutil.rmtree(staging, ignore_errors=True)


def _move_files(staging: Path, target: Path) -> None:
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name == PROCESSOR)  # last: it says that all are there
    weights = {path.name for path in files if path.parent == Path() and path.name.startswith("model")}
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / path).replace(target / path)
    for old in target.glob("model*.safetensors*") if weights else ():
        if old.name not in weights:  # shards of another division
            old.unlink()


def _is_of_writing(error: BaseException) -> TypeGuard[Exception]:
    """Whether an error is one of files; PyTorch's own writer raises RuntimeErrors, which may be anything."""
    from_pytorch = ("inline_container", "PytorchStreamWriter")
    return isinstance(error, (OSError, SafetensorError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in from_pytorch)
    )


def _plain(error: Exception) -> Exception:
    """What PyTorch's writer means, which knows no reason."""
    return (
        OSError("PyTorch could write a file only in part, as on a full disk")
        if isinstance(error, RuntimeError)
        else error
    )
