"""FiftyOne's App server on loopback, whose page asks nobody else for anything.

    python -m conceptseg_hf.integrations.fiftyone_app.server --port 5151

FiftyOne's page wants fonts from Google, and parts of it want code and maps from elsewhere. Every answer of this server
tells the browser to refuse that.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Inline and eval, because the App styles itself inline and its decoders are wasm; blob and data, for its workers.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'"
_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-dns-prefetch-control", b"off"),  # else some browsers look up the hosts of links before anyone clicks
]


def confined(app: ASGIApp) -> ASGIApp:
    """Adds the headers to every answer of an application; what it streams stays a stream."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await app(scope, receive, send_with_headers)

    return answer


def main(arguments: list[str] | None = None) -> None:
    """Serves until it is interrupted; FiftyOne's settings are those of the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m conceptseg_hf.integrations.fiftyone_app.server",
        description="FiftyOne's App server on 127.0.0.1; its page reaches no other server. Ctrl-C ends it.",
    )
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args(arguments).port

    os.environ["FIFTYONE_SERVER"] = "1"  # FiftyOne reads it when it is imported
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
