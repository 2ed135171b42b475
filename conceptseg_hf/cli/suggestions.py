"""What may have been meant, where a word of the command line is unknown."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
from collections.abc import Iterable, Sequence

_UNKNOWN = (re.compile(r"unrecognized arguments: (\S+)"), re.compile(r"invalid choice: '(.+?)'"))


def suggest(message: str, parser: argparse.ArgumentParser) -> str:
    """A message of argparse, with the option or choice that comes next to what was typed."""
    for pattern in _UNKNOWN:
        if match := pattern.search(message):
            return message + did_you_mean(match[1].partition("=")[0], _words(parser))
    return message


def unknown_option(words: Sequence[str], parser: argparse.ArgumentParser) -> str | None:
    """The first word that looks like an option and is none of the parser's; those of subcommands are theirs to know."""
    passes_on = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in parser._actions)
    ends = (lambda word: not word.startswith("-")) if passes_on else (lambda word: word == "--")
    options = parser._option_string_actions
    for word in itertools.takewhile(lambda word: not ends(word), words):
        name = word.partition("=")[0]
        if name.startswith("--") and not any(option.startswith(name) for option in options):
            return word
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that offers the known word which is most like another; empty where none is."""
    lower = {name.lower(): name for name in known}
    [*found] = difflib.get_close_matches(word.lower(), lower, n=1)
    return f" (did you mean {lower[found[0]]!r}?)" if found else ""


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """All options and choices of a parser."""
    actions = parser._actions
    options = [option for action in actions for option in action.option_strings]
    return options + [str(choice) for action in actions for choice in action.choices or ()]
