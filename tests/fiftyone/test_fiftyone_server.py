"""Tests that neither the App server nor its page contacts other hosts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from reached_hosts import audited, hosts_in

from conceptseg_hf.integrations.fiftyone_app.server import POLICY, confined

# Requests that code of a plugin could make from the page and from a worker; each returns its outcome.
ATTEMPTS = """async () => {
    const get = "fetch('https://outside.invalid/').then(() => 'answered', () => 'refused')";
    const worker = new Worker(URL.createObjectURL(new Blob([get + ".then(postMessage)"])));
    return [await eval(get), await new Promise((done) => worker.onmessage = (message) => done(message.data))];
}"""


def test_headers_are_added_and_responses_are_still_streamed():
    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"server", b"x")]})
        for part in (b"one", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": part == b"one"})
            assert sent[-1]["body"] == part

    async def send(message):
        sent.append(message)

    sent = []
    with ThreadPoolExecutor(1) as thread:  # Playwright's event loop may run in the main thread
        thread.submit(asyncio.run, confined(application)({"type": "http"}, None, send)).result()
    assert len(sent) == 3
    headers = dict(sent[0]["headers"])
    assert headers[b"server"] == b"x" and headers[b"content-security-policy"] == POLICY.encode()


def test_audit_hook_records_contacted_hosts(tmp_path):
    code = """if True:
        import socket
        socket.getaddrinfo("127.0.0.2", 80)
        with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            datagrams.connect(("192.0.2.1", 9))  # sends nothing
    """
    environment = audited(os.environ, tmp_path / "hosts")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert hosts_in(tmp_path / "hosts") == {"127.0.0.2", "192.0.2.1"}


@pytest.mark.slow
def test_the_app_contacts_only_loopback(page, outside, server, make_dataset, hosts_reached):
    from app_driver import App

    for path in ("", "/datasets/any", "/fiftyone", "/plugins/conceptseg/fiftyone.yml"):
        with urllib.request.urlopen(server + path) as response:
            assert response.headers["Content-Security-Policy"] == POLICY
    App(page, server).open(make_dataset(3).name)  # waits for the grid
    assert page.evaluate(ATTEMPTS) == ["refused", "refused"]
    assert outside == []
    assert hosts_reached() == {"127.0.0.1"}
