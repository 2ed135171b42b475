"""The `conceptseg` command.

Nothing here imports the rest of the package before a subcommand runs (see launcher.py), so inside subcommands imports
are absolute.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import ablate, compare, convert, data, demo, evaluate, info, segment, train
from .arguments import BadInputError, installed_version, os_error_sentence
from .outputs import make_printable
from .suggestions import suggest, unknown_option

_SUBCOMMANDS = (demo, segment, evaluate, compare, ablate, train, convert, data, info)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, not in a page of usage, and what may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Names a misspelled option first: argparse would speak of what is missing without it."""
        args = sys.argv[1:] if args is None else list(args)
        if (unknown := unknown_option(args, self)) is not None:
            self.error(f"unrecognized arguments: {unknown}")
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {suggest(message.rstrip('.'), self)}. See {self.prog} --help.\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"{parser.prog} {installed_version('conceptseg-hf')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each subcommand adds its own."""
    parser = _Parser(
        prog="conceptseg",
        description="Segment what a prompt means, by words or by reasoning over reference images.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subcommands = parser.add_subparsers(
        title="subcommands", dest="subcommand", metavar="SUBCOMMAND", required=True
    )
    for subcommand in _SUBCOMMANDS:
        subcommand.add_parser(subcommands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The words after `conceptseg`; those of the process by default.

    Returns:
        The exit code: 0; 2 after bad input, which is explained in one sentence on standard error; 130 if stopped, 141
        if whoever reads the output stopped reading.
    """
    make_printable()
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = arguments.run(arguments)
        _flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough, as in `conceptseg data list | head`
        _leave_stdout()
        return 141
    except BadInputError as error:
        reason = str(error)
    except OSError as error:
        reason = os_error_sentence(error)
    except KeyboardInterrupt as error:
        print(f"conceptseg {arguments.subcommand}: {str(error) or 'stopped.'}", file=sys.stderr)
        return 130
    try:
        _flush()
    except (OSError, BadInputError):
        _leave_stdout()
    print(f"conceptseg {arguments.subcommand}: {reason}", file=sys.stderr)
    return 2


def _flush() -> None:
    """Flushes standard output, which may be a file on a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave_stdout()
        raise BadInputError(
            f"standard output cannot be written: {error.strerror}; make room there."
        ) from error


def _leave_stdout() -> None:
    """Python flushes once more as it ends, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_in_utf8() -> None:
    """Starts the process anew in Python's UTF-8 mode, where the locale knows only ASCII.

    File names and words beyond ASCII, as a list of samples has them, could not be used otherwise.
    """
    ascii_only = sys.getfilesystemencoding().lower() not in ("utf-8", "utf8")
    if ascii_only and not sys.flags.utf8_mode and os.name == "posix":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
