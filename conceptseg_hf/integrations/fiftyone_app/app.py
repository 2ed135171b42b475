"""Start MongoDB and FiftyOne's App with ConceptShapes on the loopback interface, with a single command.

    python -m conceptseg_hf.integrations.fiftyone_app

All files are written to one folder. The user's FiftyOne folders and database are not modified, unless
`FIFTYONE_DATABASE_URI` is set.
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
# `python -m` would import `conceptseg_hf` and torch, which delays the server. Running the file by its path would put
# its folder at the start of `sys.path`.
_RUN = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
_WORK = "from fiftyone.core.cli import main; main()"
_START_SECONDS = 180.0
# Closing a terminal sends SIGHUP, which does not exist on Windows.
_TERMINATION_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(arguments: list[str] | None = None) -> int:
    """Run the App until it is interrupted; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_hf.integrations.fiftyone_app",
        description="Open FiftyOne's App with ConceptShapes and the ConceptSeg plugin. Press Ctrl-C to stop.",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("fiftyone_app"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, help="port of the App (default: a free port)")
    parser.add_argument(
        "--samples", type=int, default=60, help="ConceptShapes targets to load (default: %(default)s)"
    )
    parser.add_argument("--plugin", type=Path, default=_PLUGIN, help="folder of the plugin")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        parser.error(f"--samples is {options.samples}; use at least 1.")
    if not (options.plugin / "fiftyone.yml").is_file():
        parser.error(f"--plugin {str(options.plugin)!r} has no fiftyone.yml; use the folder fiftyone_plugin.")
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
        _print_line(f"FiftyOne is running at {address} (press Ctrl-C to stop).")
        worker = start_worker(log)
        _print_line(f"A worker process executes scheduled runs; its log is {log}.")
        _print_line(
            f"To use Python or `fiftyone` in a second terminal, first run there:\n{export_line(settings)}"
        )
        if not options.no_browser:
            webbrowser.open(address)
        return _wait(server, worker, log)
    except KeyboardInterrupt:
        return 0
    finally:
        for process in filter(None, (worker, server)):
            stop_server(process)


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _wait(server: subprocess.Popen, worker: subprocess.Popen, log: Path) -> int:
    """Wait for the server; print a message if the worker ends first."""
    while worker.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(timeout=1)
    _print_line(
        f"The worker has ended, so scheduled runs are not executed; see {log} for the reason. To start a worker, run "
        "the line above in a second terminal, then: fiftyone delegated launch"
    )
    return server.wait()


def export_line(settings: Mapping[str, str]) -> str:
    """Return a shell command line that sets FiftyOne's settings, to use the same database in another process."""
    if os.name == "nt":
        return " & ".join(f"set {name}={value}" for name, value in settings.items())
    return "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())


def start_worker(log: Path) -> subprocess.Popen:
    """Start a worker (`fiftyone delegated launch`), which executes the runs that the App schedules."""
    with log.open("w") as file:
        command = [sys.executable, "-u", "-c", _WORK, "delegated", "launch"]
        return subprocess.Popen(command, stdout=file, stderr=file)


def _handle_signals() -> None:
    """Handle termination signals like Ctrl-C; by default Python would exit at once and leave MongoDB running."""
    for number in _TERMINATION_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored, for example, under nohup
            signal.signal(number, _interrupt_once)


def _interrupt_once(*_: Any) -> None:
    for number in _TERMINATION_SIGNALS:  # further signals must not interrupt the cleanup
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def start_server(port: int, log: Path) -> subprocess.Popen:
    """Start the App server of `server.py` and wait until it responds.

    The server inherits FiftyOne's settings from the environment of this process.

    Raises:
        RuntimeError: If the server does not start.
    """
    command = [sys.executable, "-c", _RUN, str(_SERVER), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        if not _answers(process, port):
            raise RuntimeError(f"FiftyOne's App server did not start; see {str(log)!r} for the reason.")
    except BaseException:
        process.kill()
        raise
    return process


def _answers(server: subprocess.Popen, port: int) -> bool:
    """Wait until the server responds; return False if it ends first or the timeout expires."""
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
    """Terminate the App server or worker; kill it after 5 s, as from Python 3.12 on it waits for every open page."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _prepare(folder: Path, plugin: Path) -> dict[str, str]:
    """Set FiftyOne's environment variables, link the plugin and start MongoDB; return the settings."""
    if importlib.util.find_spec("fiftyone") is None:
        raise ImportError("FiftyOne is not installed; install it with: pip install 'conceptseg-hf[fiftyone]'")
    plugins = folder / "plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    link = plugins / "conceptseg"
    if link.is_symlink():
        link.unlink()
    try:
        link.symlink_to(plugin, target_is_directory=True)
    except OSError:  # creating symbolic links may require privileges
        shutil.copytree(plugin, link, dirs_exist_ok=True)
    settings = {
        "FIFTYONE_PLUGINS_DIR": plugins,
        "FIFTYONE_DEFAULT_DATASET_DIR": folder / "data",
        "FIFTYONE_MODEL_ZOO_DIR": folder / "zoo",
        "FIFTYONE_DATABASE_NAME": "conceptseg",
        "FIFTYONE_DATABASE_VALIDATION": "false",  # avoids a warning about MongoDB 6 in every process
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_ALLOW_LEGACY_ORCHESTRATORS": "true",  # enables "Schedule" in the forms
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
