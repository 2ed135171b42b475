"""`make app`: one command, on loopback, and nothing left behind."""

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
    """The addresses at which a process and its children listen."""
    family = [process, *process.children(recursive=True)]
    return {
        connection.laddr.ip
        for member in family
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


def reached(process: psutil.Process) -> set[str]:
    """The addresses that a process and its children are connected to."""
    family = [process, *process.children(recursive=True)]
    connections = (connection for member in family for connection in member.net_connections(kind="inet"))
    return {connection.raddr.ip for connection in connections if connection.raddr}


# Schedules a run as the App does, and waits for the worker.
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
    """Whether a process is there and not merely unburied."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def handle_interrupts() -> None:
    """What a shell runs in the background ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])  # a closing terminal: below
def test_one_command_opens_the_app_and_a_signal_ends_it(folder, tmp_path, ending):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FIFTYONE_")}
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
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=audited(kept, tmp_path / "hosts"),
        preexec_fn=handle_interrupts,
    )
    children = []
    try:
        line = app.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/datasets/concept-shapes", line)[0]
        assert urllib.request.urlopen(address).status == 200
        process = psutil.Process(app.pid)
        children = process.children(recursive=True)
        assert {"mongod"} < {child.name() for child in children}
        assert listening(process) == {"127.0.0.1"} == reached(process)
        notified = [app.stdout.readline() for _ in range(3)]
        assert "Scheduled runs are done by a worker" in notified[0] and "in a second terminal" in notified[1]
        if ending == signal.SIGTERM:
            shell = [notified[2].strip(), shlex.join([sys.executable, "-c", SCHEDULE])]
            done = subprocess.run("\n".join(shell), shell=True, capture_output=True, text=True, env=kept)
            assert done.stdout == "completed 3\n", done.stderr
        children = process.children(recursive=True)
        app.send_signal(ending)
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


def test_a_worker_that_ends_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fiftyone_app, "_WORK", "raise SystemExit(3)")
    log = tmp_path / "worker.log"
    worker = fiftyone_app.start_worker(log)
    assert worker.wait() == 3
    server = subprocess.Popen([sys.executable, "-c", ""])
    assert fiftyone_app._wait(server, worker, log) == 0
    said = capsys.readouterr().out
    assert f"The worker has ended, so scheduled runs wait; {log} says why." in said
    assert "fiftyone delegated launch" in said


def test_settings_survive_a_shell():
    settings = {"FIFTYONE_A": "a b'c", "FIFTYONE_B": "mongodb://127.0.0.1:1/"}
    line = fiftyone_app.export_line(settings)
    done = subprocess.run(f"{line}; env", shell=True, capture_output=True, text=True, check=True)
    assert {"FIFTYONE_A=a b'c", "FIFTYONE_B=mongodb://127.0.0.1:1/"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "0"], "--samples is 0; use at least 1."),
        (["--plugin", "nowhere"], "has no fiftyone.yml"),
    ],
)
def test_bad_words_end_with_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        fiftyone_app.main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_second_signal_does_not_cut_the_end_off_and_nohup_counts():
    code = """if True:
        import os, signal
        from conceptseg_hf.integrations.fiftyone_app import app as fiftyone_app
        fiftyone_app._handle_signals()
        try:
            os.kill(os.getpid(), signal.SIGHUP)
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
    assert done.stdout == "closed\nended\n"


def test_an_interrupted_start_leaves_no_server(tmp_path, monkeypatch):
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


def test_a_database_in_use_is_told_by_its_process(tmp_path):
    if find_mongod() is None:
        pytest.skip("there is no MongoDB")
    start_mongod(tmp_path)
    pid = next(
        child.pid for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())
    )
    with pytest.raises(RuntimeError, match=rf"process {pid} uses '.*'; end the app .*: kill {pid}$"):
        start_mongod(tmp_path)
