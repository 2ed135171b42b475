"""The server of the page: on the loopback interface, without analytics, and its page contacts no other server."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from .uploads import MAX_BYTES

if TYPE_CHECKING:
    from .sessions import Demo

HOST = "127.0.0.1"
DEFAULT_PORT = 7860
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'"
)


class _Confined:
    """ASGI middleware that forbids the page to contact other servers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def find_port(port: int | None) -> int:
    """Return `port` if it is free, or by default the first free port from 7860.

    Raises:
        ValueError: If the port is in use.
    """
    candidates = range(DEFAULT_PORT, DEFAULT_PORT + 100) if port is None else (port,)
    for candidate in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, candidate))
            except OSError:
                continue
            return candidate
    raise ValueError(
        f"port {candidates[0]} is in use; give another one with --port."
        if port is not None
        else f"all ports from {DEFAULT_PORT} are in use; give one with --port."
    )


def serve(demo: Demo, port: int, note: str = "", wait: bool = True) -> Any:
    """Serve the page on the loopback interface.

    Args:
        demo: The model.
        port: TCP port.
        note: A remark below the title.
        wait: Whether to block until the process is interrupted; otherwise the server runs in a thread.

    Returns:
        The `gradio.Blocks`, whose `close` ends the server.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .browser import CSS, PREPARE_PAGE
    from .layout import THEME
    from .page import build_page

    page = build_page(demo, note)
    page.queue(max_size=32)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=not wait,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size=MAX_BYTES,
        theme=THEME,
        css=CSS,
        js=PREPARE_PAGE,
        app_kwargs={
            # Other host names would allow pages of other origins to reach the server (DNS rebinding).
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                Middleware(_Confined),
            ],
            "docs_url": None,
            "redoc_url": None,
        },
    )
    return page
