"""Writing a checkpoint shard by shard, in a folder that appears only when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from .. import writing
from ..progress import progress_bar
from ..writing import is_full, write_error
from .errors import ConversionError
from .plan import Step
from .sources import INDEX_NAME, SAFETENSORS_NAME

SHARD_BYTES = 2 * 10**9
"""Size that a shard does not exceed, unless one tensor does."""


@contextmanager
def new_folder(out: Path, nbytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block is through; else nothing is left.

    Args:
        out: Must not exist, or be empty.
        nbytes: What will be written; refused if the disk has less.

    Raises:
        ConversionError: If `out` is taken, cannot be made, or the disk is too full.
    """
    check_free(out)
    parents = out.absolute().parents
    made = [parent for parent in parents if not parent.exists()]
    free = shutil.disk_usage(parents[len(made)]).free
    if free < nbytes:
        raise ConversionError(
            f"output folder {str(out)!r} needs {nbytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left; make "
            "room, or give another folder."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix="-unfinished", dir=out.parent))
    except OSError as error:
        raise ConversionError(
            f"output folder {str(out)!r} cannot be made ({error.strerror}); give another."
        ) from error
    try:
        yield folder
        folder.chmod(0o755)  # a temporary folder is made for its owner alone
        folder.replace(out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:  # innermost first; those in use stay
            try:
                parent.rmdir()
            except OSError:
                break
        if isinstance(error, OSError) and is_full(error):
            raise ConversionError(str(write_error(out, error))) from error
        raise


def check_free(out: Path) -> None:
    """Raises a ConversionError if there is something at `out`."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        fault = "exists and is not empty" if out.is_dir() else "is a file, not a folder"
        raise ConversionError(f"output folder {str(out)!r} {fault}; remove it or give another.")


def write_shards(steps: Sequence[Step], folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes the tensors, holding those of one shard at a time.

    Args:
        steps: The tensors to write.
        folder: Where to.
        shard_bytes: Size of a shard.

    Returns:
        The files: one `model.safetensors`, or shards (their index is written too).
    """
    shards: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if shards[-1] and size + step.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += step.nbytes
    names = [SAFETENSORS_NAME]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(step.nbytes for step in steps)
    with progress_bar(total, "B", "writing weights", leave=False) as progress:
        for name, shard in zip(names, shards):
            tensors = {}
            for step in shard:
                tensors[step.target] = step.read()
                progress.update(step.nbytes)
            try:
                save_file(tensors, folder / name, metadata={"format": "pt"})
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"weight file {write_error(name, error)}") from error
            (folder / name).chmod(0o644)  # safetensors writes for the owner alone
            del tensors
            for step in shard:
                step.source.release()
    if len(shards) > 1:
        weight_map = {step.target: name for name, shard in zip(names, shards) for step in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [folder / name for name in names]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, keys in order."""
    writing.write_json(path, content, sort_keys=True, ensure_ascii=False)
