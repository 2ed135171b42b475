"""The `conceptseg` command-line interface.

The rest of the package is imported only when a subcommand runs (see launcher.py). Subcommands use absolute imports,
because the launcher loads this package under another name.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from . import ablate, app, batch, compare, convert, data, demo, env, evaluate, induce, info, segment, train
from .arguments import BadInputError, installed_version, os_error_sentence
from .outputs import make_printable
from .suggestions import suggest, unknown_option

_SUBCOMMANDS = (demo, app, segment, induce, batch, evaluate, compare, ablate, train, convert, data, info, env)


class _Parser(argparse.ArgumentParser):
    """Parser that reports errors in one sentence with a suggestion, instead of printing the usage."""

    extra_arguments_hint = ""  # of a subcommand, for more arguments than it takes

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Report a misspelled option before argparse reports a required option as missing."""
        args = sys.argv[1:] if args is None else list(args)
        if (unknown := unknown_option(args, self)) is not None:
            self.error(f"unrecognized arguments: {unknown}")
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            hint = "" if any(word.startswith("-") for word in rest) else self.extra_arguments_hint
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {suggest(message.rstrip('.'), self)}. See {self.prog} --help.\n")


class _Version(argparse.Action):
    """Action that looks up the version only when `--version` is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"{parser.prog} {installed_version('conceptseg-hf')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command with all subcommands."""
    parser = _Parser(
        prog="conceptseg",
        description="Segment concepts in images from text prompts and optional reference images.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subcommands = parser.add_subparsers(
        title="subcommands", dest="subcommand", metavar="SUBCOMMAND", required=True
    )
    for subcommand in _SUBCOMMANDS:
        subcommand.add_parser(subcommands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Command-line arguments after `conceptseg`; by default those of the process.

    Returns:
        The exit code: 0 on success, 2 for invalid input (with a one-sentence error on standard error), 130 if
        interrupted, 141 if the reader of the output has closed the pipe.
    """
    make_printable()
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _plain_warnings(arguments.subcommand):
            code = arguments.run(arguments)
        _flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as in `conceptseg data list | head`
        _discard_stdout()
        return 141
    except BadInputError as error:
        reason = str(error)
    except OSError as error:
        reason = os_error_sentence(error)
    except KeyboardInterrupt as error:
        print(f"conceptseg {arguments.subcommand}: {str(error) or 'interrupted.'}", file=sys.stderr)
        return 130
    try:
        _flush()
    except (OSError, BadInputError):
        _discard_stdout()
    print(f"conceptseg {arguments.subcommand}: {reason}", file=sys.stderr)
    return 2


@contextmanager
def _plain_warnings(subcommand: str) -> Iterator[None]:
    """Print each warning for users in one line, without the source code that it comes from."""
    show = warnings.showwarning

    def show_plainly(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if category is UserWarning:
            print(f"conceptseg {subcommand}: warning: {message}", file=sys.stderr)
        else:
            show(message, category, *args, **kwargs)

    warnings.showwarning = show_plainly
    try:
        yield
    finally:
        warnings.showwarning = show


def _flush() -> None:
    """Flush standard output, which may be a file on a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise BadInputError(
            f"standard output cannot be written: {error.strerror}; free some disk space."
        ) from error


def _discard_stdout() -> None:
    """Redirect standard output to devnull, because Python flushes it at exit and would report the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_in_utf8() -> None:
    """Restart the process in Python's UTF-8 mode if the locale only supports ASCII.

    Otherwise non-ASCII file names and text, for example of a dataset, could not be used.
    """
    ascii_only = sys.getfilesystemencoding().lower() not in ("utf-8", "utf8")
    if ascii_only and not sys.flags.utf8_mode and os.name == "posix":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
