"""The records of an evaluation on disk: written as they are made, resumed, and merged across processes.

A folder holds settings.json (the settings of the run) and records.jsonl (one record per line, with the index of its
sample). While several processes run, each writes a separate file, records.N.jsonl; the next run reads all of them,
whatever its number of processes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...writing import json_text, open_new, write_error, write_json
from ..distributed import ALONE, Processes
from .record import RECORD_FIELDS
from .settings import changed_settings, read_settings

Record = dict[str, Any]


class RecordStore:
    """The records of one benchmark by sample index, mirrored in a folder if one is given.

    Args:
        folder: The folder, or None.
        settings: The settings of the run; a folder with records of other settings is rejected.
        processes: The processes that share the work; each opens a store.
        total: Number of samples; a folder with records of more samples is rejected.
        identify: Returns the fields of a sample's record that are known beforehand, given its index; a folder with
            records of other samples is rejected. Failed records are not compared, as their files may have been fixed.

    Raises:
        ValueError: If the folder holds records of another run or of more samples, or several processes have no folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        settings: dict[str, Any],
        processes: Processes = ALONE,
        total: int | None = None,
        identify: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> None:
        self._records: dict[int, Record] = {}
        self._processes = processes
        self._folder = None if folder is None else Path(folder)
        self._file: io.FileIO | None = None
        self._seen: dict[Path, int] = {}
        if self._folder is None:
            if processes.world_size > 1:
                raise ValueError(
                    "evaluate: several processes exchange records through files; give an output_dir that all of them "
                    "can access."
                )
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self._folder, error) from error
        self._check_settings(settings)
        self._records = self._read()
        self._check_records(total, identify)
        processes.barrier()  # files may change only after all processes have read them
        if processes.is_main:
            write_json(self._folder / "settings.json", settings)
            self._merge()
        processes.barrier()
        # Unbuffered, so that data that could not be written is not written again when the file is closed.
        self._file = self._own_path.open("ab", buffering=0)

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, index: int) -> bool:
        return index in self._records

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def add(self, records: Iterable[tuple[int, Record]]) -> None:
        """Add the records of a batch and write them immediately."""
        added = dict(records)
        self._records |= added
        if self._file is not None:
            lines = "".join(_line(index, record) for index, record in added.items()).encode()
            try:
                while lines:  # a disk that fills up accepts only part of a write
                    lines = lines[self._file.write(lines) :]
            except OSError as error:
                remedy = "free some disk space and run again to resume from the existing records"
                raise write_error(self._own_path, error, remedy) from error

    def count_of_others(self) -> int:
        """Return the number of records that the other processes have written since the last call."""
        count = 0
        for path in self._parts():
            if path != self._own_path:
                with path.open("rb") as file:
                    file.seek(self._seen.get(path, 0))
                    text = file.read()
                count += text.count(b"\n")
                self._seen[path] = self._seen.get(path, 0) + len(text)
        return count

    def finish(self) -> None:
        """Wait for the other processes; then every store has all records, and records.jsonl has them by index."""
        if self._file is None:
            return
        self._file.close()
        self._processes.barrier()
        if self._processes.world_size > 1:
            self._records = self._read()
        self._processes.barrier()  # files may change only after all processes have read them
        if self._processes.is_main:
            self._merge()

    @property
    def _existing_folder(self) -> Path:
        assert self._folder is not None  # without a folder, nothing is read or written
        return self._folder

    @property
    def _own_path(self) -> Path:
        name = "records.jsonl" if self._processes.world_size == 1 else f"records.{self._processes.rank}.jsonl"
        return self._existing_folder / name

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("records.*.jsonl")) if self._folder is not None else []

    def _read(self) -> dict[int, Record]:
        """Read all records of the folder; later records replace earlier ones."""
        merged = self._existing_folder / "records.jsonl"
        paths = [*([merged] if merged.exists() else []), *self._parts()]
        return {index: record for path in paths for index, record in read_records(path)}

    def _merge(self) -> None:
        """Rewrite records.jsonl by index, without a line that was cut off when a run was killed."""
        parts = self._parts()
        with open_new(self._existing_folder / "records.jsonl") as file:
            file.writelines(_line(index, self._records[index]) for index in sorted(self._records))
        for part in parts:
            part.unlink()

    def _check_settings(self, expected: dict[str, Any]) -> None:
        path = self._existing_folder / "settings.json"
        if not path.exists():
            if (self._existing_folder / "records.jsonl").exists():
                raise ValueError(
                    f"evaluate: {str(self._folder)!r} holds records without settings.json, so their settings are "
                    "unknown; give another output folder, or remove this one."
                )
            return
        stored = read_settings(path)
        if stored is None:
            raise ValueError(
                f"evaluate: {str(path)!r} does not hold the settings of a run; give another output folder, or remove "
                "this one."
            )
        if changed := changed_settings(stored, expected):
            raise self._other_run(", ".join(changed))

    def _check_records(self, total: int | None, identify: Callable[[int], Mapping[str, Any]] | None) -> None:
        for index, record in self._records.items():
            if identify is None or record["error"] is not None or (total is not None and index >= total):
                continue
            expected = identify(index)
            if any(record.get(name, value) != value for name, value in expected.items()):
                raise self._other_run(f"samples, such as {expected['sample_id']!r}")
        if total is not None and any(index >= total for index in self._records):
            raise ValueError(
                f"evaluate: {str(self._folder)!r} holds records of more samples than the {total} requested; give a "
                "larger limit or another output folder."
            )

    def _other_run(self, differing: str) -> ValueError:
        return ValueError(
            f"evaluate: {str(self._folder)!r} holds the records of another run (different {differing}); give another "
            "output folder, or remove this one."
        )


def _line(index: int, record: Record) -> str:
    return json_text({"index": index, **record}) + "\n"


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the complete records of a file with their indices; damaged lines are skipped and evaluated again."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if _is_complete(record):
                yield record.pop("index"), record


def _is_complete(record: Any) -> bool:
    """Whether a parsed line is a record with its index; a bool is an instance of int but not an index."""
    return (
        isinstance(record, dict)
        and type(record.get("index")) is int
        and record["index"] >= 0
        and record.keys() >= RECORD_FIELDS
        and isinstance(record["scores"], dict | None)
    )
