"""FiftyOne's App server on the loopback interface; its page contacts no other server.

    python -m conceptseg_hf.integrations.fiftyone_app.server --port 5151

FiftyOne's page requests fonts from Google, and parts of it request code and maps from other hosts. A content security
policy in each response of this server blocks these requests.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The App requires unsafe-inline for its styles, unsafe-eval for its wasm decoders, and blob and data for its workers.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'"
_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-dns-prefetch-control", b"off"),  # some browsers resolve the hosts of links in advance
]


def confined(app: ASGIApp) -> ASGIApp:
    """Wrap an ASGI application to add the headers to every response, without buffering streamed responses."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await app(scope, receive, send_with_headers)

    return application


def main(arguments: list[str] | None = None) -> None:
    """Run the server until it is interrupted, with FiftyOne's settings from the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_hf.integrations.fiftyone_app.server",
        description="FiftyOne's App server on 127.0.0.1; its page contacts no other server. Press Ctrl-C to stop.",
    )
    parser.add_argument("--port", type=int, required=True, help="TCP port to listen on")
    port = parser.parse_args(arguments).port

    os.environ["FIFTYONE_SERVER"] = "1"  # read when FiftyOne is imported
    from fiftyone.server.app import app
    from fiftyone.server.events import set_port
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    set_port(port)
    # Starlette and Hypercorn annotate the same interface (ASGI) differently.
    asyncio.run(serve(confined(app), config))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
