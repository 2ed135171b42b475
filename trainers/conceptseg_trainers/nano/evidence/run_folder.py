"""The settings of the runs in a folder, so that results with other settings are not mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conceptseg_hf.writing import json_text, write_file

from .training import TrainSettings


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
