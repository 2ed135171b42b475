"""Suggestions for unknown names. `cli.suggestions` has a copy, because the CLI starts without importing the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the known name closest to `name`, ignoring case; empty if none is close."""
    lower = {known_name.lower(): known_name for known_name in known}
    matches = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[matches[0]]!r}?)" if matches else ""
