"""Who writes to a field right now, and which run into it was interrupted.

FiftyOne keeps no such record. Here each name that is written to has a document in a collection of FiftyOne's database,
which all processes that use the database see. A process that ended without a word holds nothing.
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
_SILENT_SECONDS = (
    15 * 60.0
)  # after which a run on another machine counts as ended; it says so if it comes back
_CLOCK_SECONDS = 60.0  # a clock that is set changes when processes seem to have started

_held: set[str] = set()  # tokens of this process


class InUseError(ValueError):
    """Another run writes to the same field."""


@dataclass(frozen=True)
class Holder:
    """A run that writes to a name (a field), or was interrupted while it did.

    Attributes:
        name: What it writes to.
        run: Key of the custom run that holds its settings, or None.
        done: Samples done.
        total: Samples to do.
        process: Its process id.
        host: The machine.
        since: When it began, in seconds since the epoch.
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
    """The names that a run holds.

    Attributes:
        cancelled: Whether the run ends before it is done; set by `beat`.
    """

    def __init__(self, dataset: fo.Dataset, names: Sequence[str], run: str | None, subject: str) -> None:
        self.cancelled = False
        self._dataset, self._names, self._run, self._subject = dataset, names, run, subject
        self._token = uuid.uuid4().hex

    def acquire(self, total: int) -> None:
        """Takes all names, or none.

        Raises:
            InUseError: If another run holds one of them.
        """
        _drop_deleted_datasets()
        check_free(
            self._dataset, self._names, self._subject
        )  # before what an interrupted run has left is replaced
        _held.add(self._token)
        try:
            for name in sorted(set(self._names)):  # in one order, so that no two runs wait for each other
                self._take(name, total)
        except BaseException:
            self.release(finished=True)
            raise

    def beat(self, done: int) -> bool:
        """Says how far the run is; True if it should end, as somebody cancelled it.

        Raises:
            InUseError: If another run has taken the names meanwhile.
        """
        documents = _collection()
        ours = documents.update_many({"token": self._token}, {"$set": {"beat": time.time(), "done": done}})
        if ours.matched_count < len(set(self._names)):
            raise InUseError(
                f"{self._subject} was taken over by another run, as this one was silent for "
                f"{round(_SILENT_SECONDS / 60)} minutes; what it has done may be replaced."
            )
        main = documents.find_one({"_id": _id(self._dataset, self._names[0])}, {"cancel": True})
        self.cancelled = bool(main and main["cancel"])
        return self.cancelled

    def release(self, finished: bool) -> None:
        """Gives the names back; of a run that did not finish, its settings' key stays, see `interrupted_run`."""
        documents, main = _collection(), _id(self._dataset, self._names[0])
        if not finished and self._run is not None:
            documents.update_one({"_id": main, "token": self._token}, {"$set": {"token": None}})
        documents.delete_many({"token": self._token})
        _held.discard(self._token)

    def _take(self, name: str, total: int) -> None:
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
            if _runs(old):
                raise _in_use(self._subject, old)
            replaced = documents.replace_one({"_id": document["_id"], "token": old["token"]}, document)
            if replaced.matched_count:
                return


@contextlib.contextmanager
def locked(
    dataset: fo.Dataset, names: Sequence[str], subject: str, run: str | None = None, total: int = 0
) -> Iterator[Lock]:
    """Holds names against other runs, of this process and of others.

    Args:
        dataset: The dataset.
        names: What is written to, such as fields; the first stands for all in `holders`.
        subject: How messages call it, such as "field 'concept'".
        run: Key of the run's settings; with it, `interrupted_run` knows of a run that did not finish.
        total: Samples to do.

    Raises:
        InUseError: If another run holds one of them.
    """
    lock = Lock(dataset, names, run, subject)
    lock.acquire(total)
    try:
        yield lock
    except BaseException:  # a generator that is not exhausted, too
        with contextlib.suppress(PyMongoError):
            lock.release(finished=False)
        raise
    lock.release(finished=not lock.cancelled)


def holders(dataset: fo.Dataset) -> list[Holder]:
    """The runs that write to a dataset now."""
    found = _collection().find({"dataset": dataset._doc.id, "main": True})
    return [_holder(document) for document in found if _runs(document)]


def check_free(dataset: fo.Dataset, names: Sequence[str], subject: str) -> None:
    """Finds a run that holds one of these names.

    Raises:
        InUseError: If there is one.
    """
    for document in _collection().find({"_id": {"$in": [_id(dataset, name) for name in names]}}):
        if _runs(document):
            raise _in_use(subject, document)


def interrupted_run(dataset: fo.Dataset, name: str) -> Holder | None:
    """The last run into a field, if it was killed, cancelled or failed before its end."""
    document = _collection().find_one({"_id": _id(dataset, name), "main": True, "run": {"$ne": None}})
    return None if document is None or _runs(document) else _holder(document)


def request_cancel(dataset: fo.Dataset, name: str) -> bool:
    """Asks the run that writes to a name to end after the batch in work; False if there is none."""
    if not any(holder.name == name for holder in holders(dataset)):
        return False
    found = _collection().update_one({"_id": _id(dataset, name)}, {"$set": {"cancel": True}})
    return bool(found.matched_count)


def _collection() -> Any:
    return odm.get_db_conn()[COLLECTION]


def _id(dataset: fo.Dataset, name: str) -> str:
    return f"{dataset._doc.id}/{name}"


def _runs(document: dict[str, Any]) -> bool:
    """Whether the run of a document is still there."""
    if document["token"] is None:
        return False
    if time.time() - document["beat"] > _SILENT_SECONDS:
        return False
    if document["host"] != socket.gethostname():
        return True
    if document["process"] == os.getpid():
        if document["token"] in _held:
            gc.collect()  # ends generators that nobody iterates any more, as when a page of the App was closed
        return document["token"] in _held
    try:
        process = psutil.Process(document["process"])
        same = abs(process.create_time() - document["process_started"]) < _CLOCK_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False


def _in_use(subject: str, document: dict[str, Any]) -> InUseError:
    return InUseError(
        f"{subject} is being written by another run ({_holder(document)}); wait for it, cancel it, or give another "
        "name."
    )


def _holder(document: dict[str, Any]) -> Holder:
    names = ("name", "run", "done", "total", "process", "host", "since")
    return Holder(**{name: document[name] for name in names})


def _drop_deleted_datasets() -> None:
    """Deletes what was left of runs into datasets that are gone; never what a new run has just written."""
    database = odm.get_db_conn()
    gone = {"dataset": {"$nin": database["datasets"].distinct("_id")}}
    ended = {"$or": [{"token": None}, {"beat": {"$lt": time.time() - _SILENT_SECONDS}}]}
    database[COLLECTION].delete_many(gone | ended)
