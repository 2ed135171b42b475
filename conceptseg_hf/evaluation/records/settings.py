"""The settings file of a folder with results, which tells whether a run may resume there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...writing import json_text

# Settings that may change when a run is resumed: they describe the environment, not the results.
INFORMATIVE = ("environment",)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings in a file, or None if it does not hold settings.

    Raises:
        OSError: If the file cannot be read.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return settings if isinstance(settings, dict) else None


def changed_settings(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ from stored ones, except for informative ones."""
    expected = json.loads(json_text(settings))
    names = [name for name in {**stored, **expected} if name not in INFORMATIVE]
    return [name for name in names if stored.get(name) != expected.get(name)]
