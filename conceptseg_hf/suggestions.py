"""What may have been meant, where a name is unknown; the command has a copy, as it starts without the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that offers the known name which is most like another, in any case; empty where none is."""
    lower = {known_name.lower(): known_name for known_name in known}
    [*found] = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" (did you mean {lower[found[0]]!r}?)" if found else ""
