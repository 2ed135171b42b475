"""`conceptseg app`: the browser demo."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import BadInputError, add_model_options, as_bad_input, load_model, positive_int

_NOTE = (
    "This is the embedded checkpoint: it knows drawn shapes and about a hundred words, and does not work on "
    "photographs. Start with `--model` to use another one."
)


def add_parser(subcommands: Any) -> None:
    """Add the parser of the subcommand."""
    parser = subcommands.add_parser(
        "app",
        help="open the browser demo on this machine",
        description="Serves a page on 127.0.0.1 on which images are segmented, references are drawn, rules edited and "
        "concepts induced. The page contacts no other server. Requires conceptseg-hf[app]. Press Ctrl-C to stop.",
    )
    parser.add_argument(
        "--port", type=positive_int, metavar="N", help="TCP port (default: the first free one from 7860)"
    )
    add_model_options(parser, router=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise BadInputError('Gradio is not installed; run: pip install "conceptseg-hf[app]".')
    from conceptseg_hf.integrations.app.server import HOST, find_port, serve

    port = as_bad_input(find_port, arguments.port)
    model, processor = load_model(arguments)
    from conceptseg_hf.integrations.app.sessions import Demo

    print(f"http://{HOST}:{port}  (press Ctrl-C to stop)", flush=True)
    as_bad_input(serve, Demo(model, processor), port, _NOTE if arguments.model is None else "")
    return 0
