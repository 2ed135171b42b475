"""Evaluations that have been run, read from their folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .store import Record, read_records


@dataclass(frozen=True)
class Run:
    """One benchmark's evaluation.

    Attributes:
        settings: What was run.
        records: The records by index of their sample.
    """

    settings: dict[str, Any]
    records: dict[int, Record]


def read_runs(folder: str | os.PathLike) -> dict[tuple[str, str], Run]:
    """Reads what `evaluate` wrote.

    Args:
        folder: An output folder, of one benchmark or of several.

    Returns:
        Runs by the name and the split of their benchmark.

    Raises:
        FileNotFoundError: If it is no such folder.
        ValueError: If a file in it cannot be read.
    """
    folder = Path(folder)
    parts = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    runs = {}
    for part in parts:
        if (part / "records.jsonl").is_file() and (part / "settings.json").is_file():
            run = _read_run(part)
            runs[run.settings.get("benchmark", ""), run.settings.get("split", "")] = run
            if part == folder:
                break
    if not runs:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no records.jsonl with its settings.json; give an output folder of conceptseg "
            "evaluate."
        )
    return runs


def _read_run(folder: Path) -> Run:
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(folder / 'settings.json')!r} is not JSON ({error}); evaluate anew."
        ) from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{str(folder / 'settings.json')!r} holds no settings; evaluate anew.")
    records = dict(read_records(folder / "records.jsonl"))
    return Run(dict(settings), {index: records[index] for index in sorted(records)})
