"""What other libraries' exceptions say, as part of a sentence."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The whole message of an error without line breaks, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
