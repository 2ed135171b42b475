"""Fixtures that start `conceptseg app` and headless Chromium."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def address(tmp_path_factory) -> Iterator[str]:
    """Start the command, and return its address when the page answers."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("Gradio is not installed: pip install -e '.[app]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "gradio"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "conceptseg_hf.cli", "app", "--port", str(port), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()
    # Gradio prints tracebacks of requests that it refuses; they contain the middleware of server.py.
    lines = (folder / "log").read_text().splitlines()
    assert not [line for line in lines if "conceptseg_hf/integrations" in line and "server.py" not in line]


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except OSError:
        return False
    return True


@pytest.fixture()
def outside() -> list[str]:
    """Return the list of URLs outside of the server that the test's page requested."""
    return []


@pytest.fixture()
def page(chromium, address, outside, request) -> Iterator[Any]:
    """Return a new page; `@pytest.mark.parametrize("page", [{...}], indirect=True)` sets options of its context."""
    options = {"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})}
    context = chromium.new_context(**options)
    context.set_default_timeout(60_000)
    context.on(
        "request",
        lambda sent: (
            outside.append(sent.url)
            if sent.url.startswith("http") and not sent.url.startswith(address)
            else None
        ),
    )
    page = context.new_page()
    page.goto(address)
    page.locator("#run").wait_for()
    yield page
    shots = os.environ.get("CONCEPTSEG_SCREENSHOTS")
    if shots:
        page.screenshot(path=f"{shots}/{request.node.name}.png", full_page=True)
    context.close()
