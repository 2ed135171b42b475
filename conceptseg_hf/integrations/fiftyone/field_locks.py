"""Locks on fields across processes, and records of interrupted runs.

FiftyOne has no such locks. Each locked name has a document in a collection of FiftyOne's database, which all processes
that use the database can read. The lock of a process that ended without releasing it is ignored.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fiftyone as fo
import fiftyone.core.odm as odm
import psutil
from pymongo.errors import DuplicateKeyError, PyMongoError

COLLECTION = "conceptseg_locks"
# A lock on another machine expires after this time without a heartbeat; its run then raises if it continues.
_TIMEOUT_SECONDS = 15 * 60.0
_CLOCK_TOLERANCE_SECONDS = 60.0  # adjusting the clock changes the apparent start times of processes

_held: set[str] = set()  # tokens of the locks that this process holds


class InUseError(ValueError):
    """Raised if another run is writing to the same field."""


@dataclass(frozen=True)
class Holder:
    """A run that holds the lock of a name (such as a field), or was interrupted while it did.

    Attributes:
        name: Locked name.
        run: Key of the custom run that stores its settings, or None.
        done: Number of processed samples.
        total: Total number of samples.
        process: Process id.
        host: Host name of the machine.
        since: Start time in seconds since the epoch.
    """

    name: str
    run: str | None
    done: int
    total: int
    process: int
    host: str
    since: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        done = f"{self.done} of {self.total} done, " if self.total else ""
        return f"{done}since {since}, process {self.process} on {self.host}"


class Lock:
    """Lock of a run on one or several names.

    Attributes:
        cancelled: Whether the run was cancelled before it was complete; set by `beat`.
    """

    def __init__(self, dataset: fo.Dataset, names: Sequence[str], run: str | None, subject: str) -> None:
        self.cancelled = False
        self._dataset, self._names, self._run, self._subject = dataset, names, run, subject
        self._token = uuid.uuid4().hex

    def acquire(self, total: int) -> None:
        """Acquire all names or none.

        Raises:
            InUseError: If another run holds one of them.
        """
        _drop_deleted_datasets()
        check_free(self._dataset, self._names, self._subject)  # before replacing records of interrupted runs
        _held.add(self._token)
        try:
            for name in sorted(set(self._names)):  # in a fixed order, to avoid deadlocks
                self._acquire_name(name, total)
        except BaseException:
            self.release(finished=True)
            raise

    def beat(self, done: int) -> bool:
        """Update the heartbeat and the progress; return whether the run was cancelled and should end.

        Raises:
            InUseError: If another run has acquired the names in the meantime.
        """
        documents = _collection()
        ours = documents.update_many({"token": self._token}, {"$set": {"beat": time.time(), "done": done}})
        if ours.matched_count < len(set(self._names)):
            raise InUseError(
                f"{self._subject} was taken over by another run, as this run sent no heartbeat for "
                f"{round(_TIMEOUT_SECONDS / 60)} minutes; run it again, as its results may be replaced."
            )
        main = documents.find_one({"_id": _id(self._dataset, self._names[0])}, {"cancel": True})
        self.cancelled = bool(main and main["cancel"])
        return self.cancelled

    def release(self, finished: bool) -> None:
        """Release the names; the record of an unfinished run with settings is kept for `interrupted_run`."""
        documents, main = _collection(), _id(self._dataset, self._names[0])
        if not finished and self._run is not None:
            documents.update_one({"_id": main, "token": self._token}, {"$set": {"token": None}})
        documents.delete_many({"token": self._token})
        _held.discard(self._token)

    def _acquire_name(self, name: str, total: int) -> None:
        process = psutil.Process()
        document = {
            "_id": _id(self._dataset, name),
            "dataset": self._dataset._doc.id,
            "name": name,
            "main": name == self._names[0],
            "run": self._run,
            "token": self._token,
            "host": socket.gethostname(),
            "process": process.pid,
            "process_started": process.create_time(),
            "since": time.time(),
            "beat": time.time(),
            "done": 0,
            "total": total,
            "cancel": False,
        }
        documents = _collection()
        while True:
            with contextlib.suppress(DuplicateKeyError):
                documents.insert_one(document)
                return
            old = documents.find_one({"_id": document["_id"]})
            if old is None:
                continue
            if _is_active(old):
                raise _in_use(self._subject, old)
            replaced = documents.replace_one({"_id": document["_id"], "token": old["token"]}, document)
            if replaced.matched_count:
                return


@contextlib.contextmanager
def locked(
    dataset: fo.Dataset, names: Sequence[str], subject: str, run: str | None = None, total: int = 0
) -> Iterator[Lock]:
    """Lock names against other runs in this and other processes.

    Args:
        dataset: Dataset of the names.
        names: Names to lock, such as fields; `holders` lists only the first.
        subject: Description for error messages, such as "field 'concept'".
        run: Key of the run's settings; required for `interrupted_run` to find an unfinished run.
        total: Total number of samples.

    Yields:
        The acquired lock.

    Raises:
        InUseError: If another run holds one of the names.
    """
    lock = Lock(dataset, names, run, subject)
    lock.acquire(total)
    try:
        yield lock
    except BaseException:  # including GeneratorExit of a generator that is not exhausted
        with contextlib.suppress(PyMongoError):
            lock.release(finished=False)
        raise
    lock.release(finished=not lock.cancelled)


def holders(dataset: fo.Dataset) -> list[Holder]:
    """Return the runs that are writing to a dataset."""
    documents = _collection().find({"dataset": dataset._doc.id, "main": True})
    return [_holder(document) for document in documents if _is_active(document)]


def check_free(dataset: fo.Dataset, names: Sequence[str], subject: str) -> None:
    """Check that no run holds one of the names.

    Raises:
        InUseError: If a run does.
    """
    for document in _collection().find({"_id": {"$in": [_id(dataset, name) for name in names]}}):
        if _is_active(document):
            raise _in_use(subject, document)


def interrupted_run(dataset: fo.Dataset, name: str) -> Holder | None:
    """Return the last run that wrote to a field if it was killed, cancelled or failed, else None."""
    document = _collection().find_one({"_id": _id(dataset, name), "main": True, "run": {"$ne": None}})
    return None if document is None or _is_active(document) else _holder(document)


def request_cancel(dataset: fo.Dataset, name: str) -> bool:
    """Request that the run that holds a name stops after the current batch; return whether there is one."""
    if not any(holder.name == name for holder in holders(dataset)):
        return False
    result = _collection().update_one({"_id": _id(dataset, name)}, {"$set": {"cancel": True}})
    return bool(result.matched_count)


def _collection() -> Any:
    return odm.get_db_conn()[COLLECTION]


def _id(dataset: fo.Dataset, name: str) -> str:
    return f"{dataset._doc.id}/{name}"


def _is_active(document: dict[str, Any]) -> bool:
    """Whether the run of a document is still active."""
    if document["token"] is None:
        return False
    if time.time() - document["beat"] > _TIMEOUT_SECONDS:
        return False
    if document["host"] != socket.gethostname():
        return True
    if document["process"] == os.getpid():
        if document["token"] in _held:
            gc.collect()  # closes abandoned generators, for example of a closed App page
        return document["token"] in _held
    try:
        process = psutil.Process(document["process"])
        same = abs(process.create_time() - document["process_started"]) < _CLOCK_TOLERANCE_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False


def _in_use(subject: str, document: dict[str, Any]) -> InUseError:
    return InUseError(
        f"{subject} is being written by another run ({_holder(document)}); wait for it, cancel it, or use another "
        "name."
    )


def _holder(document: dict[str, Any]) -> Holder:
    names = ("name", "run", "done", "total", "process", "host", "since")
    return Holder(**{name: document[name] for name in names})


def _drop_deleted_datasets() -> None:
    """Delete the documents of ended runs on deleted datasets; those of active runs are kept."""
    database = odm.get_db_conn()
    deleted_dataset = {"dataset": {"$nin": database["datasets"].distinct("_id")}}
    ended = {"$or": [{"token": None}, {"beat": {"$lt": time.time() - _TIMEOUT_SECONDS}}]}
    database[COLLECTION].delete_many(deleted_dataset | ended)
