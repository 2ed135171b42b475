"""Writing of a checkpoint shard by shard, in a folder that is created only when it is complete."""

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
"""Maximum size of a shard with more than one tensor."""


@contextmanager
def new_folder(out: Path, nbytes: int = 0) -> Iterator[Path]:
    """Context manager that creates a temporary folder, renames it to `out` on success and removes it on errors.

    Args:
        out: Output folder, which must not exist or be empty.
        nbytes: Number of bytes that will be written, for a check of the free disk space.

    Raises:
        ConversionError: If `out` is in use or cannot be created, or if there is not enough disk space.
    """
    check_free(out)
    parents = out.absolute().parents
    created = [parent for parent in parents if not parent.exists()]
    free = shutil.disk_usage(parents[len(created)]).free
    if free < nbytes:
        raise ConversionError(
            f"output folder {str(out)!r} needs {nbytes / 1e9:.1f} GB, but the disk has only {free / 1e9:.1f} GB left; "
            "free some disk space, or give another folder."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix="-unfinished", dir=out.parent))
    except OSError as error:
        raise ConversionError(
            f"output folder {str(out)!r} cannot be created ({error.strerror}); give another folder."
        ) from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp creates folders with mode 0700
        folder.replace(out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:  # innermost first, until one is not empty
            try:
                parent.rmdir()
            except OSError:
                break
        if isinstance(error, OSError) and is_full(error):
            raise ConversionError(str(write_error(out, error))) from error
        raise


def check_free(out: Path) -> None:
    """Raise a ConversionError unless `out` does not exist or is an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        fault = "exists and is not empty" if out.is_dir() else "is a file, not a folder"
        raise ConversionError(f"output folder {str(out)!r} {fault}; remove it or give another folder.")


def write_shards(steps: Sequence[Step], folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the tensors, keeping one shard at a time in memory.

    Args:
        steps: The tensors to write.
        folder: Output folder.
        shard_bytes: Maximum size of a shard in bytes.

    Returns:
        The written files: `model.safetensors`, or the shards (their index is also written).
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
            (folder / name).chmod(0o644)  # safetensors creates files with mode 0600
            del tensors
            for step in shard:
                step.source.release()
    if len(shards) > 1:
        weight_map = {step.target: name for name, shard in zip(names, shards) for step in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [folder / name for name in names]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys."""
    writing.write_json(path, content, sort_keys=True, ensure_ascii=False)
