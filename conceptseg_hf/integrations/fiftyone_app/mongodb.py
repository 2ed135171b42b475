"""A MongoDB of one's own for FiftyOne, on loopback. Imports no FiftyOne: it must run before that is imported.

FiftyOne brings MongoDB where its package could download it, and looks for it in that one place only. Here it is looked
for in more places, and FiftyOne is told by `FIFTYONE_DATABASE_URI`.
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
    """A `mongod` that runs: named by `CONCEPTSEG_MONGOD`, FiftyOne's, the environment's, or the PATH's."""
    for candidate in _candidates():
        try:
            done = subprocess.run([candidate, "--version"], capture_output=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return candidate
    return None


def _candidates() -> Iterator[str]:
    if VARIABLE in os.environ:
        yield os.environ[VARIABLE]
    below = Path("db", "bin", "mongod")
    spec = importlib.util.find_spec("fiftyone")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        yield str(Path(folder) / below)
    yield str(Path(sys.prefix, "mongo", "fiftyone") / below)  # where .ci/setup puts it
    found = shutil.which("mongod")
    if found is not None:
        yield found


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_mongod(folder: Path, cache_gigabytes: float = 0.25) -> str:
    """Starts a MongoDB on a free port of loopback and returns its URI; it ends with this process.

    Import FiftyOne after this call: its own clean-up then runs while the database still answers.

    Args:
        folder: Its files, made if they are not there.
        cache_gigabytes: Memory for its cache; MongoDB needs at least 0.25.

    Raises:
        RuntimeError: If no `mongod` was found, or it does not start.
    """
    mongod = find_mongod()
    if mongod is None:
        raise RuntimeError(
            f"no MongoDB was found; install one, name its mongod in {VARIABLE}, or set FIFTYONE_DATABASE_URI."
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
    # A session of its own: Ctrl-C must not end it before FiftyOne has cleaned up.
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
    raise RuntimeError(_why_not_started(folder, log))


def _why_not_started(folder: Path, log: Path) -> str:
    with contextlib.suppress(OSError):
        if "DBPathInUse" in log.read_text(errors="replace"):
            holder = (folder / "mongod.lock").read_text().strip()
            return (
                f"MongoDB does not start, as process {holder} uses {str(folder)!r}; end the app that it belongs to or, "
                f"if that was killed, the process itself: kill {holder}"
            )
    return f"MongoDB does not start; {str(log)!r} says why."


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
