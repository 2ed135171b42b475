"""Suggestions for unknown options and arguments of the command line."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
from collections.abc import Iterable, Sequence

_UNKNOWN = (re.compile(r"unrecognized arguments: (\S+)"), re.compile(r"invalid choice: '(.+?)'"))


def suggest(message: str, parser: argparse.ArgumentParser) -> str:
    """Extend an error message of argparse with the closest known option or choice."""
    for pattern in _UNKNOWN:
        if match := pattern.search(message):
            return message + did_you_mean(match[1].partition("=")[0], _options_and_choices(parser))
    return message


def unknown_option(arguments: Sequence[str], parser: argparse.ArgumentParser) -> str | None:
    """Return the first unknown option, excluding arguments of subcommands, which their own parsers check."""
    has_subcommands = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in parser._actions)
    ends = (lambda value: not value.startswith("-")) if has_subcommands else (lambda value: value == "--")
    options = parser._option_string_actions
    for argument in itertools.takewhile(lambda value: not ends(value), arguments):
        name = argument.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in options):
            return argument
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the known name closest to `word`, ignoring case; empty if none is close."""
    lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), lower, n=1)
    return f" (did you mean {lower[matches[0]]!r}?)" if matches else ""


def _options_and_choices(parser: argparse.ArgumentParser) -> list[str]:
    """Return all options and choices of a parser."""
    actions = parser._actions
    options = [option for action in actions for option in action.option_strings]
    return options + [str(choice) for action in actions for choice in action.choices or ()]
