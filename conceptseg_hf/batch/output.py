"""The output folder of a batch job: results per batch, merged into shards, and the settings of the job.

    settings.json                   what the results depend on
    unfinished/00000012.parquet     a finished batch, until all batches of its shard are finished
    results/00000.parquet           a shard

Files are written under temporary names and renamed, so a killed job loses only the batches it was working on. Their
content does not depend on when or by which process a batch was computed: a resumed job writes the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..evaluation.records.settings import changed_settings, read_settings
from ..writing import write_error, write_file, write_json
from .errors import BatchError
from .job import BatchJob
from .requirements import import_parquet
from .rows import Row, schema

SETTINGS, RESULTS, UNFINISHED = "settings.json", "results", "unfinished"


def write_batch(folder: Path, batch: int, rows: Sequence[Row]) -> None:
    """Write the rows of a finished batch."""
    import pyarrow as pa

    write_file(_batch_path(folder, batch), _encode(pa.Table.from_pylist(list(rows), schema())))


def is_written(folder: Path, job: BatchJob, batch: int) -> bool:
    """Whether the rows of a batch are on disk, alone or in their shard."""
    shard = _shard_path(folder, batch // job.batches_per_shard)
    return _batch_path(folder, batch).exists() or shard.exists()


@contextmanager
def open_output(folder: str | os.PathLike, job: BatchJob) -> Iterator[OutputFolder]:
    """Context manager that opens the output folder of a job, which no other process can open meanwhile.

    Args:
        folder: The folder, which is created if it does not exist.
        job: The job.

    Raises:
        BatchError: If the folder holds the results of another job or damaged files, or another process uses it.
        OSError: If the folder cannot be written.
    """
    settings = job.settings()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with _locked(folder):
        _check_settings(folder, settings)
        _remove_temporary_files(folder)
        yield OutputFolder(folder, job)


class OutputFolder:
    """The results of a job on disk; see `open_output`.

    Args:
        folder: The folder.
        job: The job.

    Attributes:
        folder: The folder.
        finished: The finished batches.
    """

    def __init__(self, folder: Path, job: BatchJob) -> None:
        self.folder, self._job = folder, job
        self._shards = {shard for shard in range(job.num_shards) if self._check_shard(shard)}
        self.finished = {batch for shard in self._shards for batch in job.batches_of(shard)}
        self._read_unfinished()

    def pending(self) -> list[int]:
        """Return the batches that are not finished, in order."""
        return [batch for batch in range(self._job.num_batches) if batch not in self.finished]

    def finish(self, batch: int) -> None:
        """Count a batch that was written, and merge its shard if all of its batches are finished."""
        self.finished.add(batch)
        shard = batch // self._job.batches_per_shard
        if shard not in self._shards and self.finished.issuperset(self._job.batches_of(shard)):
            self._merge(shard)

    def close(self) -> None:
        """Remove the folder of unfinished batches, if all are finished."""
        if len(self._shards) == self._job.num_shards:
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)

    def retry_failed(self) -> None:
        """Count batches with failed images as not finished, because their files may have been fixed."""
        parquet = import_parquet()
        for shard in sorted(self._shards):
            table = parquet.read_table(_shard_path(self.folder, shard))
            batches = self._job.batches_of(shard)
            starts = [
                self._job.rows_of(batch).start - self._job.rows_of(batches[0]).start for batch in batches
            ]
            parts = {
                batch: table.slice(start, len(self._job.rows_of(batch)))
                for batch, start in zip(batches, starts)
            }
            failed = {batch for batch, part in parts.items() if _has_errors(part)}
            if not failed:
                continue
            for batch in set(batches) - failed:
                write_file(_batch_path(self.folder, batch), _encode(parts[batch]))
            _shard_path(self.folder, shard).unlink()
            self._shards.remove(shard)
            self.finished -= failed
        for batch in [batch for batch in self.finished if _batch_path(self.folder, batch).exists()]:
            path = _batch_path(self.folder, batch)
            if _has_errors(parquet.read_table(path, columns=["error"])):
                path.unlink()
                self.finished.remove(batch)

    def read(self, columns: list[str]) -> Iterator[Row]:
        """Yield the rows of all shards in order, one shard in memory at a time."""
        for shard in sorted(self._shards):
            yield from (
                import_parquet().read_table(_shard_path(self.folder, shard), columns=columns).to_pylist()
            )

    def _merge(self, shard: int) -> None:
        import pyarrow as pa

        paths = [_batch_path(self.folder, batch) for batch in self._job.batches_of(shard)]
        tables = [import_parquet().read_table(path) for path in paths]
        write_file(_shard_path(self.folder, shard), _encode(pa.concat_tables(tables)))
        self._shards.add(shard)
        for path in paths:
            path.unlink()

    def _check_shard(self, shard: int) -> bool:
        """Whether a shard exists.

        Raises:
            BatchError: If it is damaged.
        """
        path = _shard_path(self.folder, shard)
        if not path.exists():
            return False
        batches = self._job.batches_of(shard)
        expected = self._job.rows_of(batches[-1]).stop - self._job.rows_of(batches[0]).start
        if _count_rows(path) != expected:
            raise BatchError(
                f"{str(path)!r} is damaged or was not written by this job; remove this file to compute it again."
            )
        return True

    def _read_unfinished(self) -> None:
        """Find finished batches; what is damaged, or merged already, is removed."""
        for path in sorted((self.folder / UNFINISHED).glob("*.parquet")):
            batch = int(path.stem) if path.stem.isdecimal() else -1
            known = 0 <= batch < self._job.num_batches and batch not in self.finished
            if known and _count_rows(path) == len(self._job.rows_of(batch)):
                self.finished.add(batch)
            else:
                path.unlink()
        for shard in set(range(self._job.num_shards)) - self._shards:
            if self.finished.issuperset(self._job.batches_of(shard)):
                self._merge(shard)


def _batch_path(folder: Path, batch: int) -> Path:
    return folder / UNFINISHED / f"{batch:08d}.parquet"


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / RESULTS / f"{shard:05d}.parquet"


def _encode(table: Any) -> bytes:
    buffer = io.BytesIO()
    import_parquet().write_table(table.combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()


def _count_rows(path: Path) -> int:
    """Return the number of rows of a table; -1 if it is damaged."""
    try:
        return import_parquet().read_metadata(path).num_rows
    except (OSError, ValueError):
        return -1


def _has_errors(table: Any) -> bool:
    return table["error"].null_count < len(table)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context manager that locks a folder; the system releases the lock of a killed process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BatchError(
            f"another job is writing to {str(folder)!r}; wait for it, or give another folder."
        ) from error
    except OSError:  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def _remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left under temporary names."""
    for place in (folder, folder / RESULTS, folder / UNFINISHED):
        for path in place.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a job, or compare them with those of an earlier run."""
    path = folder / SETTINGS
    if not path.exists():
        if any(folder.glob(f"{RESULTS}/*")):
            raise BatchError(
                f"{str(folder)!r} holds results without {SETTINGS}, so their settings are unknown; give "
                "another folder, or remove this one."
            )
        write_json(path, settings)
        return
    stored = read_settings(path)
    if stored is None:
        raise BatchError(
            f"{str(path)!r} does not hold the settings of a job; give another folder, or remove this one."
        )
    if changed := changed_settings(stored, settings):
        raise BatchError(
            f"{str(folder)!r} holds the results of another job (different {', '.join(changed)}); give "
            "another folder, or remove this one."
        )
