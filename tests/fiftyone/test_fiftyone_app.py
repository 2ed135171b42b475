"""`make app`: one command, on loopback, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request

import psutil
import pytest
from reached_hosts import audited, hosts_in

from conceptseg_hf.integrations import fiftyone_app

pytestmark = pytest.mark.slow


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


def heed_interrupts() -> None:
    """What a shell runs in the background ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_one_command_opens_the_app(folder, tmp_path):
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
        preexec_fn=heed_interrupts,
    )
    try:
        line = app.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/datasets/concept-shapes", line)[0]
        assert urllib.request.urlopen(address, timeout=60).status == 200
        process = psutil.Process(app.pid)
        children = process.children(recursive=True)
        assert {"mongod"} < {child.name() for child in children}
        assert listening(process) == {"127.0.0.1"} == reached(process)
        app.send_signal(signal.SIGINT)
        assert app.wait(timeout=60) == 0
    finally:
        app.kill()
        app.wait()
        app.stdout.close()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert hosts_in(tmp_path / "hosts") == {"127.0.0.1"}
    written = {path.name for path in (tmp_path / "app").iterdir()}
    assert {"database", "data", "plugins", "zoo"} <= written


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
