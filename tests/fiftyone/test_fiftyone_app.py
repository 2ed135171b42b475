"""Tests of `python -m conceptseg_hf.integrations.fiftyone_app` (`make app`)."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request

import psutil
import pytest
from reached_hosts import audited, hosts_in

from conceptseg_hf.integrations.fiftyone_app import app as fiftyone_app
from conceptseg_hf.integrations.fiftyone_app.mongodb import find_mongod, start_mongod


def listening(process: psutil.Process) -> set[str]:
    """Return the addresses on which a process and its children listen."""
    family = [process, *process.children(recursive=True)]
    return {
        connection.laddr.ip
        for member in family
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


def connected(process: psutil.Process) -> set[str]:
    """Return the addresses to which a process and its children are connected."""
    family = [process, *process.children(recursive=True)]
    connections = (connection for member in family for connection in member.net_connections(kind="inet"))
    return {connection.raddr.ip for connection in connections if connection.raddr}


# Schedule a run like the App, and wait for the worker.
SCHEDULE = """
import time
import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators.delegated import DelegatedOperationService
dataset = fo.load_dataset("concept-shapes")
params = {"prompt": "star", "router": "sam_only"}
context = {"dataset": dataset.name, "params": params, "request_delegation": True}
foo.execute_operator("@conceptseg/conceptseg/segment_concept", context)
state = "queued"
while state not in ("completed", "failed"):
    time.sleep(0.2)
    [operation] = DelegatedOperationService().list_operations(dataset_name=dataset.name)
    state = operation.run_state
dataset.reload()
print(state, dataset.count("concept"))
"""


def running(process: psutil.Process) -> bool:
    """Whether a process is running and not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.heavy
def test_command_starts_the_app_and_a_signal_stops_it(folder, tmp_path):
    """SIGTERM; the test of signals below shows that SIGINT and SIGHUP end in the same way."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FIFTYONE_")}
    command = [
        sys.executable,
        "-m",
        "conceptseg_hf.integrations.fiftyone_app",
        "--no-browser",
        "--samples",
        "3",
    ]
    command += ["--folder", str(tmp_path / "app")]
    app = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=audited(environment, tmp_path / "hosts")
    )
    children = []
    try:
        line = app.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/datasets/concept-shapes", line)[0]
        assert urllib.request.urlopen(address).status == 200
        process = psutil.Process(app.pid)
        children = process.children(recursive=True)
        assert {"mongod"} < {child.name() for child in children}
        assert listening(process) == {"127.0.0.1"} == connected(process)
        lines = [app.stdout.readline() for _ in range(3)]
        assert "A worker process executes scheduled runs" in lines[0] and "in a second terminal" in lines[1]
        shell = [lines[2].strip(), shlex.join([sys.executable, "-c", SCHEDULE])]
        done = subprocess.run("\n".join(shell), shell=True, capture_output=True, text=True, env=environment)
        assert done.stdout == "completed 3\n", done.stderr
        children = process.children(recursive=True)
        app.send_signal(signal.SIGTERM)
        assert app.wait() == 0
        assert not [child for child in children if running(child)]
    finally:
        for child in filter(running, children):
            child.kill()
        app.kill()
        app.wait()
        app.stdout.close()
    assert hosts_in(tmp_path / "hosts") == {"127.0.0.1"}
    written = {path.name for path in (tmp_path / "app").iterdir()}
    assert {"database", "data", "plugins", "zoo"} <= written


def test_end_of_the_worker_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fiftyone_app, "_WORK", "raise SystemExit(3)")
    log = tmp_path / "worker.log"
    worker = fiftyone_app.start_worker(log)
    assert worker.wait() == 3
    server = subprocess.Popen([sys.executable, "-c", ""])
    assert fiftyone_app._wait(server, worker, log) == 0
    output = capsys.readouterr().out
    assert "The worker has ended" in output and str(log) in output
    assert "fiftyone delegated launch" in output


def test_export_line_is_quoted_for_the_shell():
    settings = {"FIFTYONE_A": "a b'c", "FIFTYONE_B": "mongodb://127.0.0.1:1/"}
    line = fiftyone_app.export_line(settings)
    done = subprocess.run(f"{line}; env", shell=True, capture_output=True, text=True, check=True)
    assert {"FIFTYONE_A=a b'c", "FIFTYONE_B=mongodb://127.0.0.1:1/"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples is 0; use at least 1."),
        (["--plugin", "nowhere"], "has no fiftyone.yml"),
    ],
)
def test_invalid_arguments_exit_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        fiftyone_app.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_signals_interrupt_once_and_ignored_signals_stay_ignored():
    code = """if True:
        import os, signal
        from conceptseg_hf.integrations.fiftyone_app import app as fiftyone_app
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
        for number, handler in handlers.items():
            signal.signal(number, handler)  # ignored in the background of a shell, or under nohup
            fiftyone_app._handle_signals()
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                print("closed")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        fiftyone_app._handle_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            print("ended")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "closed\nclosed\nended\n"


def test_an_interrupted_start_kills_the_server(tmp_path, monkeypatch):
    servers = []

    def interrupted(server, port):
        servers.append(server)
        raise KeyboardInterrupt

    script = tmp_path / "server.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(fiftyone_app, "_SERVER", script)
    monkeypatch.setattr(fiftyone_app, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fiftyone_app.start_server(1, tmp_path / "server.log")
    assert servers[0].wait() != 0


def test_a_database_in_use_raises_with_the_process_id(tmp_path):
    if find_mongod() is None:
        pytest.skip("mongod was not found")
    start_mongod(tmp_path)
    pid = next(
        child.pid for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())
    )
    with pytest.raises(RuntimeError, match=rf"process {pid} uses '.*'; stop the app .*: kill {pid}$"):
        start_mongod(tmp_path)
