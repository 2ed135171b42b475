"""Messages of exceptions of other libraries, formatted for use within a sentence."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, or its class name if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
