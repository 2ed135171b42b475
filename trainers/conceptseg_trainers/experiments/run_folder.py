"""The files of the runs in a folder: settings, so that results with others are not mixed, logs and checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conceptseg_hf.writing import json_text, write_file

from .settings import TrainSettings

TRAINING_LOG = "training.json"


def check_settings(folder: Path, settings: TrainSettings, start: Path, samples: int) -> None:
    """Check that finished arms in a folder have the same settings, or write the settings to an empty folder.

    Args:
        folder: Folder of the runs.
        settings: How arms are trained.
        start: Folder of the base checkpoint.
        samples: Number of samples per evaluation set.

    Raises:
        ValueError: If the folder contains results with other settings.
    """
    check_run_settings(folder, {**asdict(settings), "samples": samples, "start": digest_of(start)})


def digest_of(checkpoint: Path) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the weights of a checkpoint.

    Raises:
        FileNotFoundError: If the folder has no weights.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(checkpoint)!r} has no weights; give the folder of a checkpoint.")
    digest = hashlib.sha256()
    for weights in files:
        digest.update(weights.read_bytes())
    return digest.hexdigest()[:16]


def check_run_settings(folder: Path, current: Mapping[str, Any]) -> None:
    """Check that the results in a folder have the given settings, or write the settings to an empty folder.

    Raises:
        ValueError: If the folder contains results with other settings.
    """
    path = folder / "settings.json"
    if not path.is_file():
        write_file(path, json_text(current, indent=2) + "\n")
        return
    existing = json.loads(path.read_text(encoding="utf-8"))
    for name, value in current.items():
        if existing.get(name) != value:
            raise ValueError(
                f"{str(folder)!r} contains results with {name} = {existing.get(name)}, but {name} is {value}; use "
                "another --output-dir."
            )


def write_log(folder: Path, seed: int, cpu_seconds: float, steps: Sequence[Mapping[str, Any]]) -> None:
    """Write "training.json": the seed, the CPU time and the metrics of each step."""
    log = {"seed": seed, "cpu_seconds": round(cpu_seconds, 1), "steps": list(steps)}
    write_file(folder / TRAINING_LOG, json_text(log) + "\n")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed at the end, so that an existing folder is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    temporary.rename(folder)
