"""The `conceptseg` command.

Nothing here imports the rest of the package before a verb runs (see launcher.py), so inside verbs imports are
absolute.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import ablate, compare, convert, data, demo, evaluate, info, segment, train
from .arguments import BadInputError, installed_version

_VERBS = (demo, segment, evaluate, compare, ablate, train, convert, data, info)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, not in a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"{parser.prog} {installed_version('conceptseg-hf')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each verb adds its own."""
    parser = _Parser(
        prog="conceptseg",
        description="Segment what a prompt means, by words or by reasoning over reference images.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The words after `conceptseg`; those of the process by default.

    Returns:
        The exit code: 0; 2 after bad input, which is explained in one sentence on standard error; 130 if stopped, 141
        if whoever reads the output stopped reading.
    """
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough, as in `conceptseg data list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return 141
    except BadInputError as error:
        print(f"conceptseg {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"conceptseg {arguments.verb}: stopped.", file=sys.stderr)
        return 130
