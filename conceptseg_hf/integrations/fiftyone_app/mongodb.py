"""Start a separate MongoDB for FiftyOne on the loopback interface, before FiftyOne is imported.

FiftyOne only uses the `mongod` that its package downloads at installation. This module searches further locations; pass
the URI of the started database to FiftyOne in `FIFTYONE_DATABASE_URI`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "CONCEPTSEG_MONGOD"
_START_SECONDS = 60.0


def find_mongod() -> str | None:
    """Return a working `mongod` from `CONCEPTSEG_MONGOD`, FiftyOne, the Python environment or PATH, or None."""
    for candidate in _candidates():
        try:
            process = subprocess.run([candidate, "--version"], capture_output=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if process.returncode == 0:
            return candidate
    return None


def _candidates() -> Iterator[str]:
    if VARIABLE in os.environ:
        yield os.environ[VARIABLE]
    relative_path = Path("db", "bin", "mongod")
    spec = importlib.util.find_spec("fiftyone")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        yield str(Path(folder) / relative_path)
    yield str(Path(sys.prefix, "mongo", "fiftyone") / relative_path)  # installed there by .ci/setup
    mongod = shutil.which("mongod")
    if mongod is not None:
        yield mongod


def free_port() -> int:
    """Return a free TCP port on the loopback interface."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_mongod(folder: Path, cache_gigabytes: float = 0.25) -> str:
    """Start a MongoDB on a free port of the loopback interface and return its URI; it ends with this process.

    Import FiftyOne after this call, so that its exit handlers run before the database is stopped.

    Args:
        folder: Folder of the database, which is created if it does not exist.
        cache_gigabytes: Size of the cache; MongoDB requires at least 0.25.

    Raises:
        RuntimeError: If no `mongod` was found, or it did not start.
    """
    mongod = find_mongod()
    if mongod is None:
        raise RuntimeError(
            f"mongod was not found; install MongoDB, set {VARIABLE} to its path, or set FIFTYONE_DATABASE_URI."
        )
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "mongod.log"
    command = [
        mongod,
        "--bind_ip",
        "127.0.0.1",
        "--port",
        str(port),
        "--dbpath",
        str(folder),
        "--logpath",
        str(log),
    ]
    command += ["--wiredTigerCacheSizeGB", str(cache_gigabytes)]
    command += [] if os.name == "nt" else ["--nounixsocket"]
    # A new session, so that Ctrl-C does not stop the database before FiftyOne's exit handlers have run.
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    atexit.register(_stop, process)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return f"mongodb://127.0.0.1:{port}/"
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(_startup_error(folder, log))


def _startup_error(folder: Path, log: Path) -> str:
    with contextlib.suppress(OSError):
        if "DBPathInUse" in log.read_text(errors="replace"):
            holder = (folder / "mongod.lock").read_text().strip()
            return (
                f"MongoDB did not start, as process {holder} uses {str(folder)!r}; stop the app of that process or, "
                f"if the app was killed, the process itself: kill {holder}"
            )
    return f"MongoDB did not start; see {str(log)!r} for the reason."


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
