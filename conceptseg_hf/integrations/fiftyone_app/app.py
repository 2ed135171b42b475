"""The newcomer's way in: MongoDB, ConceptShapes and FiftyOne's App on loopback, in one command.

    python -m conceptseg_hf.integrations.fiftyone_app

Everything it writes lies below one folder; FiftyOne's own folders and database stay as they are, unless
`FIFTYONE_DATABASE_URI` names a database.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...shipped import find_shipped_folder
from .mongodb import free_port, start_mongod

DATASET = "concept-shapes"
_PLUGIN = find_shipped_folder("fiftyone_plugin")
_SERVER = Path(__file__).with_name("server.py")
# Not `-m`, which would import `conceptseg_hf`, and torch, before the server answers; nor the file by its path, which
# would put its folder before site-packages, and the `fiftyone` in it before FiftyOne.
_RUN = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
_WORK = "from fiftyone.core.cli import main; main()"
_START_SECONDS = 180.0
# A terminal that closes sends the second; Windows has none.
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(arguments: list[str] | None = None) -> int:
    """Runs until it is interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_hf.integrations.fiftyone_app",
        description="Opens FiftyOne's App on ConceptShapes with the ConceptSeg plugin. Ctrl-C ends it.",
    )
    parser.add_argument("--folder", type=Path, default=Path("fiftyone_app"), help="where everything goes")
    parser.add_argument("--port", type=int, help="of the App (default: a free one)")
    parser.add_argument(
        "--samples", type=int, default=60, help="ConceptShapes targets to load (default: %(default)s)"
    )
    parser.add_argument("--plugin", type=Path, default=_PLUGIN, help="folder of the plugin")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error(f"--samples is {options.samples}; use at least 1.")
    if not (options.plugin / "fiftyone.yml").is_file():
        parser.error(
            f"--plugin {str(options.plugin)!r} has no fiftyone.yml; give the folder fiftyone_plugin."
        )
    folder, port = options.folder.absolute(), options.port or free_port()
    _handle_signals()
    try:
        settings = _prepare(folder, options.plugin.absolute())
        _load(options.samples)
        server = start_server(port, folder / "server.log")
    except (RuntimeError, ImportError, OSError) as error:
        parser.exit(2, f"fiftyone_app: {error}\n")
    except KeyboardInterrupt:
        return 130
    worker = None
    try:
        address, log = f"http://127.0.0.1:{port}/datasets/{DATASET}", folder / "worker.log"
        _say(f"FiftyOne is at {address}; Ctrl-C ends it.")
        worker = start_worker(log)
        _say(f"Scheduled runs are done by a worker beside it, which writes to {log}.")
        _say(f"For Python or `fiftyone` in a second terminal, run there first:\n{export_line(settings)}")
        if not options.no_browser:
            webbrowser.open(address)
        return _wait(server, worker, log)
    except KeyboardInterrupt:
        return 0
    finally:
        for process in filter(None, (worker, server)):
            stop_server(process)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _wait(server: subprocess.Popen, worker: subprocess.Popen, log: Path) -> int:
    """Waits for the server, and says so if the worker ends before."""
    while worker.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(timeout=1)
    _say(
        f"The worker has ended, so scheduled runs wait; {log} says why. Start one in a second terminal, after the line "
        "above: fiftyone delegated launch"
    )
    return server.wait()


def export_line(settings: Mapping[str, str]) -> str:
    """One line for a shell that gives another process the same FiftyOne."""
    if os.name == "nt":
        return " & ".join(f"set {name}={value}" for name, value in settings.items())
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())


def start_worker(log: Path) -> subprocess.Popen:
    """Starts what `fiftyone delegated launch` is: it does the runs that the App schedules, one after another."""
    with log.open("w") as file:
        command = [sys.executable, "-u", "-c", _WORK, "delegated", "launch"]
        return subprocess.Popen(command, stdout=file, stderr=file)


def _handle_signals() -> None:
    """Lets other signals end the app as Ctrl-C does: by default they end Python at once, and MongoDB would stay."""
    for number in _ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt_once)


def _interrupt_once(*_: Any) -> None:
    for number in _ENDINGS:  # a closing terminal may send several, which must not cut the clean-up off
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def start_server(port: int, log: Path) -> subprocess.Popen:
    """Starts the App server of `server.py` and waits until it answers.

    FiftyOne's settings are taken from this process's environment.

    Raises:
        RuntimeError: If it does not start.
    """
    command = [sys.executable, "-c", _RUN, str(_SERVER), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        if not _answers(process, port):
            raise RuntimeError(f"FiftyOne's App server does not start; {str(log)!r} says why.")
    except BaseException:
        process.kill()
        raise
    return process


def _answers(server: subprocess.Popen, port: int) -> bool:
    """Waits until the server answers; False if it ends before, or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/fiftyone", timeout=5),
        ):
            return True
        time.sleep(0.2)
    return False


def stop_server(process: subprocess.Popen) -> None:
    """Ends the App server, or the worker; from Python 3.12 on it would wait for every open page: it gets 5 seconds."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _prepare(folder: Path, plugin: Path) -> dict[str, str]:
    """Sets what FiftyOne reads when it is imported; returns those settings."""
    if importlib.util.find_spec("fiftyone") is None:
        raise ImportError("FiftyOne is not installed; install it with: pip install 'conceptseg-hf[fiftyone]'")
    plugins = folder / "plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    link = plugins / "conceptseg"
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(plugin, target_is_directory=True)
    except OSError:  # systems where links need rights
        shutil.copytree(plugin, link, dirs_exist_ok=True)
    settings = {
        "FIFTYONE_PLUGINS_DIR": plugins,
        "FIFTYONE_DEFAULT_DATASET_DIR": folder / "data",
        "FIFTYONE_MODEL_ZOO_DIR": folder / "zoo",
        "FIFTYONE_DATABASE_NAME": "conceptseg",
        "FIFTYONE_DATABASE_VALIDATION": "false",  # else a warning about MongoDB 6 in every process
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_ALLOW_LEGACY_ORCHESTRATORS": "true",  # lets the form offer "Schedule"
        "FIFTYONE_OPERATOR_TIMEOUT": "86400",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, str(value))
    if "FIFTYONE_DATABASE_URI" not in os.environ:
        os.environ["FIFTYONE_DATABASE_URI"] = start_mongod(folder / "database")
    return {name: os.environ[name] for name in ("FIFTYONE_DATABASE_URI", *settings)}


def _load(samples: int) -> None:
    from ...progress import progress_bar
    from ..fiftyone import install_zoo_models, load_concept_benchmark

    install_zoo_models()
    with progress_bar(samples, "samples", DATASET) as bar:
        load_concept_benchmark(
            "concept-shapes",
            limit=samples,
            dataset_name=DATASET,
            progress=lambda done, _: bar.update(int(done - bar.n)),
        )
