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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from random_coprs import save_random_coprs


@contextmanager
def run_app(folder: Path, *options: str) -> Iterator[str]:
    """Start the command, and return its address when the page answers."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("Gradio is not installed: pip install -e '.[app]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "gradio"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "conceptseg_hf.cli", "app", "--port", str(port), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
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


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Return the address of a page with the embedded checkpoint."""
    with run_app(tmp_path_factory.mktemp("app")) as url:
        yield url


@pytest.fixture(scope="session")
def coprs_checkpoint(tmp_path_factory) -> Path:
    """Return the folder of a random CoPRS checkpoint."""
    folder = tmp_path_factory.mktemp("coprs")
    save_random_coprs(folder)
    return folder


@pytest.fixture(scope="module")
def coprs_address(tmp_path_factory, coprs_checkpoint) -> Iterator[str]:
    """Return the address of a page with the random CoPRS checkpoint."""
    with run_app(tmp_path_factory.mktemp("app"), "--model", str(coprs_checkpoint)) as url:
        yield url


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


@contextmanager
def open_page(browser: Any, url: str, outside: list[str], name: str, **options: Any) -> Iterator[Any]:
    """Return a new page of an address; URLs that it requests from other servers are added to `outside`."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(60_000)
    context.on(
        "request",
        lambda sent: (
            outside.append(sent.url) if sent.url.startswith("http") and not sent.url.startswith(url) else None
        ),
    )
    page = context.new_page()
    page.goto(url)
    page.locator("#run").wait_for()
    yield page
    shots = os.environ.get("CONCEPTSEG_SCREENSHOTS")
    if shots:
        page.screenshot(path=f"{shots}/{name}.png", full_page=True)
    context.close()


@pytest.fixture()
def page(chromium, address, outside, request) -> Iterator[Any]:
    """Return a new page; `@pytest.mark.parametrize("page", [{...}], indirect=True)` sets options of its context."""
    with open_page(chromium, address, outside, request.node.name, **getattr(request, "param", {})) as page:
        yield page


@pytest.fixture()
def coprs_page(chromium, coprs_address, outside, request) -> Iterator[Any]:
    """Return a new page with the random CoPRS checkpoint."""
    with open_page(chromium, coprs_address, outside, request.node.name) as page:
        yield page
