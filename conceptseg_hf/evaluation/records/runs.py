"""Reads evaluations from their output folders."""

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
    """The evaluation of one benchmark.

    Attributes:
        settings: The settings of the evaluation.
        records: The records by sample index.
    """

    settings: dict[str, Any]
    records: dict[int, Record]


def read_runs(folder: str | os.PathLike) -> dict[tuple[str, str], Run]:
    """Read evaluations that `evaluate` wrote.

    Args:
        folder: An output folder of `evaluate`, for one benchmark or for several.

    Returns:
        Runs by the name and the split of their benchmark.

    Raises:
        FileNotFoundError: If the folder holds no evaluation.
        ValueError: If a file in it cannot be parsed.
    """
    folder = Path(folder)
    folders = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    runs = {}
    for run_folder in folders:
        if (run_folder / "records.jsonl").is_file() and (run_folder / "settings.json").is_file():
            run = _read_run(run_folder)
            runs[run.settings.get("benchmark", ""), run.settings.get("split", "")] = run
            if run_folder == folder:
                break
    if not runs:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no records.jsonl with settings.json; give an output folder of conceptseg evaluate."
        )
    return runs


def _read_run(folder: Path) -> Run:
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(folder / 'settings.json')!r} is not JSON ({error}); run the evaluation again."
        ) from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{str(folder / 'settings.json')!r} is not a JSON object; run the evaluation again.")
    records = dict(read_records(folder / "records.jsonl"))
    return Run(dict(settings), {index: records[index] for index in sorted(records)})
