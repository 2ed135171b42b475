"""The records of an evaluation on disk: written as they are made, found again, merged from several processes.

A folder holds settings.json (what was run) and records.jsonl (a record a line, with the index of its sample). While
several processes run, each has a file of its own beside it, records.N.jsonl; whoever comes next, in whatever number,
finds them all.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...writing import json_text, write_error, open_new, write_json
from ..distributed import ALONE, Processes
from .record import RECORD_FIELDS

Record = dict[str, Any]

# Settings that may change while a run goes on: they tell where it ran, not what.
INFORMATIVE = ("environment",)


class RecordStore:
    """The records of one benchmark by index of their sample; mirrored in a folder, if there is one.

    Args:
        folder: The folder, or None.
        settings: What is run; records of something else are refused.
        processes: Those that share the work; each opens its own store.
        total: How many samples there are; records of more are refused.
        identify: Gives those fields of a sample's record that are known beforehand, by its index; records of other
            samples are refused. Those that failed are not asked, as whatever was wrong may have been mended.

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
                    "evaluate: several processes share their records in files; give output_dir, a folder that all "
                    "of them reach."
                )
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self._folder, error) from error
        self._check_settings(settings)
        self._records = self._read()
        self._check_records(total, identify)
        processes.barrier()  # until all have read: then files may change
        if processes.is_main:
            write_json(self._folder / "settings.json", settings)
            self._merge()
        processes.barrier()
        # Without a buffer, so that what could not be written is not tried once more when the file is closed.
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
        """Takes the records of a batch and writes them at once."""
        added = dict(records)
        self._records |= added
        if self._file is not None:
            lines = "".join(_line(index, record) for index, record in added.items()).encode()
            try:
                while lines:  # a disk that fills up takes a part
                    lines = lines[self._file.write(lines) :]
            except OSError as error:
                remedy = "make room and run again, which goes on from the records that were made"
                raise write_error(self._own_path, error, remedy) from error

    def count_of_others(self) -> int:
        """How many records the other processes have written since the last call."""
        found = 0
        for path in self._parts():
            if path != self._own_path:
                with path.open("rb") as file:
                    file.seek(self._seen.get(path, 0))
                    text = file.read()
                found += text.count(b"\n")
                self._seen[path] = self._seen.get(path, 0) + len(text)
        return found

    def finish(self) -> None:
        """Waits for the other processes; then all records are in every store, and in records.jsonl by index."""
        if self._file is None:
            return
        self._file.close()
        self._processes.barrier()
        if self._processes.world_size > 1:
            self._records = self._read()
        self._processes.barrier()  # until all have read
        if self._processes.is_main:
            self._merge()

    @property
    def _place(self) -> Path:
        assert self._folder is not None  # without a folder nothing is read or written
        return self._folder

    @property
    def _own_path(self) -> Path:
        name = "records.jsonl" if self._processes.world_size == 1 else f"records.{self._processes.rank}.jsonl"
        return self._place / name

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("records.*.jsonl")) if self._folder is not None else []

    def _read(self) -> dict[int, Record]:
        """All records of the folder; later ones replace earlier ones."""
        whole = self._place / "records.jsonl"
        paths = [*([whole] if whole.exists() else []), *self._parts()]
        return {index: record for path in paths for index, record in read_records(path)}

    def _merge(self) -> None:
        """Writes records.jsonl anew: by index, and without the line that was cut off when a run was killed."""
        parts = self._parts()
        with open_new(self._place / "records.jsonl") as file:
            file.writelines(_line(index, self._records[index]) for index in sorted(self._records))
        for part in parts:
            part.unlink()

    def _check_settings(self, wanted: dict[str, Any]) -> None:
        path = self._place / "settings.json"
        wanted = json.loads(json_text(wanted))
        if not path.exists():
            if (self._place / "records.jsonl").exists():
                raise ValueError(
                    f"evaluate: {str(self._folder)!r} holds records without settings.json, which says what they are "
                    "of; give another output folder, or remove this one."
                )
            return
        found = self._read_settings(path)
        names = [name for name in {**found, **wanted} if name not in INFORMATIVE]
        differing = [name for name in names if found.get(name) != wanted.get(name)]
        if differing:
            raise self._other_run(", ".join(differing))

    def _read_settings(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"evaluate: {str(path)!r} does not hold the settings of a run; give another output folder, or remove "
                "this one."
            )
        return found

    def _check_records(self, total: int | None, identify: Callable[[int], Mapping[str, Any]] | None) -> None:
        for index, record in self._records.items():
            if identify is None or record["error"] is not None or (total is not None and index >= total):
                continue
            known = identify(index)
            if any(record.get(name, value) != value for name, value in known.items()):
                raise self._other_run(f"samples, such as {known['sample_id']!r}")
        if total is not None and any(index >= total for index in self._records):
            raise ValueError(
                f"evaluate: {str(self._folder)!r} holds records of more samples than the {total} asked for; give a "
                "larger limit or another output folder."
            )

    def _other_run(self, differing: str) -> ValueError:
        return ValueError(
            f"evaluate: {str(self._folder)!r} holds the records of another run (other {differing}); give another "
            "output folder, or remove this one."
        )


def _line(index: int, record: Record) -> str:
    return json_text({"index": index, **record}) + "\n"


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The whole records of a file; what a kill, a power cut or an editor left of others is done again."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if _is_whole(record):
                yield record.pop("index"), record


def _is_whole(record: Any) -> bool:
    """Whether a line is a record with its index; a bool is an int to Python, but no index."""
    return (
        isinstance(record, dict)
        and type(record.get("index")) is int
        and record["index"] >= 0
        and record.keys() >= RECORD_FIELDS
        and isinstance(record["scores"], dict | None)
    )
